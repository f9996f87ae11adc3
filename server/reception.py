"""What devices say of themselves, and what the authority says of them: who is there, and who is out."""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import WARN_BEFORE, Sender
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence, TimeReply, TimeRequest, Who
from fleetune.edge.protocol.topics import Topics
from fleetune.server.registry import Registry

log = logging.getLogger(__name__)

_ASK_EVERY = 5.0
"""Seconds between two questions to one device."""

_STRANGERS = 64
"""Devices that are named once each though they are not in the fleet file."""

_WARN_EVERY = 86400.0
"""Seconds between two words on the aggregator's own credential, which nobody renews but its operator."""


class Reception:
    """Knows the devices by what comes from them.

    Args:
        link: To the broker.
        topics: Of the fleet.
        registry: Is told who is there, and who is revoked.
    """

    def __init__(self, link: Link, topics: Topics, registry: Registry) -> None:
        self._link, self._topics, self._registry = link, topics, registry
        self._asked: dict[str, float] = {}  # device → when it was asked who it is
        self._strangers: set[str] = set()
        self._warn_at = 0.0
        self._see_revoked()

    def look_after_own(self) -> None:
        """Say in time that the aggregator's own credential expires: devices will refuse what is signed after that."""
        identity = self._link.seals.identity
        if identity is None or time.monotonic() < self._warn_at:
            return
        self._warn_at = time.monotonic() + _WARN_EVERY
        expires = identity.credential.expires
        if expires < self._link.seals.clock.now() + WARN_BEFORE:
            end = datetime.fromtimestamp(expires, timezone.utc)
            log.warning(
                "the aggregator's credential expires on %s: `fleetune fleet rotate aggregator`, then start this again",
                f"{end:%Y-%m-%d}",
            )

    def introduce(self) -> None:
        """Tell devices who the aggregator is, so that they can verify what it says."""
        if self._link.seals.signed:
            self._link.publish(self._topics.aggregator_introduction, self._link.seals.introduction, retain=True)

    def trust(self, raw: bytes) -> None:
        """The authority's newest document.

        Raises:
            MessageError: It is not one of this fleet.
        """
        trust = self._link.seals.hear_trust(raw)
        if trust is not None:
            log.info("takes version %d of the fleet's trust document", trust.version)
            self._see_revoked()

    def introduction(self, device: str, raw: bytes) -> None:
        """A device says who it is; nothing where an introduction was taken back.

        Raises:
            MessageError: It is not of this device, or does not count.
        """
        if raw and self._link.seals.meet(raw, Sender("device", device)):
            self._see_revoked()

    def _see_revoked(self) -> None:
        revoked = self._link.seals.revoked_devices()
        for device in sorted(revoked - self._registry.revoked):
            if self._link.seals.knows(Sender("device", device)):  # or it has not said yet whether it is back
                log.warning("%s is revoked; no round waits for it", device)
        self._registry.shut_out(revoked)

    def presence(self, device: str, event: Received) -> None:
        """A device says where it stands.

        Raises:
            MessageError: It is not from this device, or from nobody who is known.
        """
        try:
            presence = self._link.seals.open(event.topic, event.payload, Presence, Sender("device", device))
        except MessageError as error:
            if error.reason == "unknown-key":
                self.ask_who(device)
            raise
        if device != presence.name:
            raise MessageError("the presence is of another device", "ignore it", reason="wrong-topic")
        if not self._registry.may_take_part(device) and presence.state != "offline":
            self._see_stranger(device)
        was_here, was_shared = self._registry.is_here(device), self._registry.is_shared(device)
        if self._registry.update(presence, retained=event.retained) and not event.retained:
            if was_here and presence.state == "offline":
                log.warning("%s is offline: %s", device, presence.detail)
            elif not was_here and presence.state != "offline":
                log.info("%s is there", device)
        if self._registry.is_shared(device) and not was_shared:
            log.warning("%s: two agents take turns under this id; give each device one of its own", device)

    def _see_stranger(self, device: str) -> None:
        if device not in self._strangers and len(self._strangers) < _STRANGERS:
            self._strangers.add(device)
            log.warning("%s is there, and the fleet file does not name it: it takes no part", device)

    def ask_who(self, device: str) -> None:
        """Have a device introduce itself again."""
        now = time.monotonic()
        if now - self._asked.get(device, -_ASK_EVERY) >= _ASK_EVERY:
            self._asked[device] = now
            self._link.say(self._topics.down(device, "who"), Who())

    def tell_time(self, device: str, event: Received) -> None:
        """A device asks for the time.

        Raises:
            MessageError: It was not this device.
        """
        question = self._link.seals.open(event.topic, event.payload, TimeRequest, Sender("device", device))
        self._link.say(self._topics.down(device, "time"), TimeReply(question.nonce, self._link.seals.clock.now()))
