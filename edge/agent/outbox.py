"""Updates on their way up: on disk first, then announced; chunks when the aggregator asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Container

import msgspec

from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import Ack, Missing, Payload, UpdateManifest
from fleetune.edge.protocol.sending import Sending
from fleetune.edge.protocol.topics import Topics

log = logging.getLogger(__name__)

_ASK_AGAIN = 3.0
"""Seconds without an answer after which an update is announced again."""

_LATER = frozenset({"no-room", "damaged", "wrong-chunk", "wrong-hash", "wrong-signature", "unknown-key"})
"""Why an update is refused that may be taken another time."""


class Outbox:
    """Sends one update after the other, the oldest first; each stays on disk until it is acknowledged or refused.

    Args:
        state: Where they are.
        link: The way up.
        topics: Of the fleet.
    """

    def __init__(self, state: State, link: Link, topics: Topics) -> None:
        self._state, self._link, self._topics = state, link, topics
        self._announced: str | None = None
        self._at = 0.0
        self._sending: Sending | None = None

    def hurry(self) -> None:
        """The link is back, or the aggregator: what it heard before may be lost."""
        self._announced, self._sending = None, None

    def send(self, runs: Container[str]) -> None:
        """Announce the oldest update, if that is due.

        Args:
            runs: Those that are led now; an update of another one waits until that is led again.
        """
        manifest = next((manifest for manifest in self._state.outbox() if manifest.run in runs), None)
        if manifest is None:
            return
        if self._sending is not None and self._sending.over:
            self._sending, self._at = None, time.monotonic()
        if manifest.update != self._announced:
            self._sending = None
        elif self._sending is not None or time.monotonic() - self._at < _ASK_AGAIN:
            return
        manifest = self._in_chunks_that_fit(manifest)
        self._announced, self._at = manifest.update, time.monotonic()
        self._link.say(self._topics.upload_manifest(manifest.device, manifest.update), manifest)
        if manifest.payload is not None and manifest.payload.chunks == 1:  # to be asked for it would cost more
            self._send_chunks(manifest, manifest.payload, b"\1")

    def _in_chunks_that_fit(self, manifest: UpdateManifest) -> UpdateManifest:
        """The same update; the broker may be another one than when it was queued."""
        if manifest.payload is None:
            return manifest
        return msgspec.structs.replace(manifest, payload=chunks.fit(manifest.payload, self._link.max_chunk))

    def _send_chunks(self, manifest: UpdateManifest, payload: Payload, bitmap: bytes) -> None:
        data = self._state.outbox_data(manifest)
        if data is None:
            log.error("%s: its file is damaged; this update is lost", manifest.update)
            self._state.drop_outbox(manifest.update)
            return
        wanted = chunks.cut(data, payload, chunks.unpack_bitmap(bitmap, payload.chunks))
        self._sending = self._link.send(
            (self._topics.upload_chunk(manifest.device, manifest.update, index), part) for index, part in wanted
        )

    def missing(self, missing: Missing) -> None:
        """Send what the aggregator asks for."""
        manifest = self._state.waiting(missing.update)
        if manifest is not None and manifest.payload is not None and manifest.update == self._announced:
            fitting = self._in_chunks_that_fit(manifest)
            assert fitting.payload is not None
            if self._sending is not None:
                self._sending.cancel()
            self._send_chunks(fitting, fitting.payload, missing.bitmap)

    def acknowledge(self, ack: Ack) -> UpdateManifest | None:
        """Let go of an update that the aggregator has, or does not want.

        Returns:
            The update that it let go of.
        """
        manifest = self._state.waiting(ack.update)
        if manifest is None:
            return None
        if not ack.accepted:
            log.warning("%s was refused: %s", ack.update, ack.reason)
        if ack.reason in _LATER:
            self._at = time.monotonic()
            return None
        if ack.accepted:
            self._state.acknowledge(ack.update)
        else:
            self._state.drop_outbox(ack.update)
        if ack.update == self._announced:
            self.hurry()
        return manifest
