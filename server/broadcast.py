"""What goes down: announcements, and the tensors that they name, once for all devices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import msgspec

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import Announcement, Need, Payload
from fleetune.edge.protocol.sending import Sending
from fleetune.edge.protocol.topics import Topics

_EXPIRY = 24 * 3600
"""Seconds that an announcement counts, from the last time that it was sent."""

_CHUNK_EXPIRY = 600
"""Seconds that the broker keeps a chunk for a device that is not connected."""

_GATHER = 0.2
"""Seconds in which devices say what they lack before it is sent once for all of them."""


class Broadcast:
    """The newest announcement of a job, on its way.

    Args:
        link: To the broker.
        topics: Of the fleet.
    """

    def __init__(self, link: Link, topics: Topics) -> None:
        self._link, self._topics = link, topics
        self._payloads: dict[str, Payload] = {}
        self._data: Mapping[str, bytes] = {}
        self._job = ""
        self._sending: Sending | None = None
        self._lacking: dict[str, set[int]] = {}
        self._due = self._issued = 0.0

    def announce(self, announcement: Announcement, data: Mapping[str, bytes], *, fresh: bool) -> None:
        """Send an announcement.

        Args:
            announcement: What is announced.
            data: Hash → bytes of the payloads that it names.
            fresh: Whether its changes go with it; when it was sent before, devices ask for what they still lack.
        """
        size = self._link.max_chunk
        named = (announcement.whole, announcement.changes)
        whole, changes = (None if payload is None else chunks.fit(payload, size) for payload in named)
        announcement = msgspec.structs.replace(self._dated(announcement), whole=whole, changes=changes)
        self._job, self._data = announcement.job, data
        self._payloads = {payload.sha256: payload for payload in (whole, changes) if payload is not None}
        self._lacking.clear()
        self._link.say(self._topics.current(announcement.job), announcement, retain=True, expiry=_EXPIRY)
        if fresh and changes is not None:
            self._send(changes, range(changes.chunks), again=False)

    def end(self, announcement: Announcement) -> None:
        """Say that a job is over."""
        self._payloads.clear()
        self._lacking.clear()
        self._link.say(self._topics.current(announcement.job), self._dated(announcement), retain=True, expiry=_EXPIRY)

    def _dated(self, announcement: Announcement) -> Announcement:
        """An announcement as of now; later than every one before."""
        self._issued = max(self._link.seals.clock.now(), self._issued + 0.001)
        return msgspec.structs.replace(announcement, issued=self._issued, expires=self._issued + _EXPIRY)

    def need(self, need: Need) -> None:
        """A device lacks some chunks; others may lack them too."""
        payload = self._payloads.get(need.sha256)
        if payload is None or need.job != self._job:
            return
        if not self._lacking:
            self._due = time.monotonic() + _GATHER
        self._lacking.setdefault(need.sha256, set()).update(chunks.unpack_bitmap(need.bitmap, payload.chunks))

    def repair(self) -> None:
        """Send what devices lack, once what was sent before is out."""
        busy = self._sending is not None and not self._sending.over
        if busy or not self._lacking or time.monotonic() < self._due:
            return
        sha256 = next(iter(self._lacking))
        self._send(self._payloads[sha256], sorted(self._lacking.pop(sha256)), again=True)

    def _send(self, payload: Payload, indices: Iterable[int], *, again: bool) -> None:
        topic = self._topics.repair_chunk if again else self._topics.broadcast_chunk
        parts = chunks.cut(self._data[payload.sha256], payload, indices)
        job, sha256 = self._job, payload.sha256
        self._sending = self._link.send(
            ((topic(job, sha256, index), part) for index, part in parts), expiry=_CHUNK_EXPIRY
        )
