"""This device's place in its fleet: who it is to the others, whom it believes, and what time it is."""

from __future__ import annotations

import logging
import math
import time

from fleetune.edge.agent.heard import Heard
from fleetune.edge.agent.renewal import Renewal
from fleetune.edge.agent.state import Counters
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import AGGREGATOR, Sender
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import Announcement, Message, TimeReply
from fleetune.edge.protocol.topics import Topics

log = logging.getLogger(__name__)

_HEAR_AGAIN = 1.0
"""Seconds after which an announcement that came damaged is to come again."""

_DENIED_FOR = 60.0
"""Seconds between two connections to a broker that drops what is said."""

_UNHEARD = frozenset({"damaged", "wrong-signature", "unknown-key"})
"""Why an announcement may count when it comes again."""

FROM_AGGREGATOR = Sender("aggregator", AGGREGATOR)


class Membership:
    """Says who this device is, and verifies who the others are.

    Args:
        link: To the broker; its seals have the device's identity, if it has one.
        topics: Of the fleet.
        device: Id of this device.
        counters: What the device knows of time, and has heard.
    """

    def __init__(self, link: Link, topics: Topics, device: str, counters: Counters) -> None:
        self._link, self._topics, self._device, self._counters = link, topics, device, counters
        link.seals.clock.told(counters.time)
        self._heard = Heard(counters.heard, link.seals.clock)
        self._renewal = Renewal(link, topics)
        self._hear_again = math.inf
        self._deny_again = 0.0

    def check(self) -> None:
        """See that this device still belongs to its fleet.

        Raises:
            IdentityError: It was put out.
        """
        self._renewal.check()

    def denied(self, reason: str) -> None:
        """The broker dropped what this device said. A new connection shows whether its certificate still counts."""
        if time.monotonic() > self._deny_again:
            self._deny_again = time.monotonic() + _DENIED_FOR
            log.warning(
                "the broker drops what this device says (%s); connects anew. If that goes on, this device was put out, "
                "or the broker's rights are old: see `fleetune doctor`",
                reason,
            )
            self._link.reconnect()

    def introduce(self) -> None:
        """Say who this is, before anything that it signs."""
        if self._link.seals.signed:
            self._link.publish(self._topics.introduction(self._device), self._link.seals.introduction, retain=True)

    def keep_time(self) -> None:
        """Note the time, for a start in the past."""
        self._counters.time = self._link.seals.clock.now()

    def step(self) -> None:
        """Ask for what is missing: the time, announcements that could not be read, a new credential."""
        if (question := self._heard.question()) is not None:
            self._link.say(self._topics.up(self._device, "time"), question)
        if time.monotonic() > self._hear_again:  # who subscribes is told what is retained
            self._hear_again = math.inf
            introduction = [self._topics.aggregator_introduction] if self._link.seals.signed else []
            for topic in (*introduction, self._topics.current("+")):  # in the order in which they have to be heard
                self._link.unsubscribe(topic)
                self._link.subscribe(topic)
        self._renewal.step()

    # --- what comes ---------------------------------------------------------------------------------------------

    def trust(self, raw: bytes) -> None:
        """The authority's newest document.

        Raises:
            MessageError: It is not one of this fleet.
            IdentityError: It puts this device out.
        """
        trust = self._link.seals.hear_trust(raw)
        if trust is not None:
            log.info("takes version %d of the fleet's trust document", trust.version)
            self.check()

    def aggregator(self, raw: bytes) -> None:
        """The aggregator says who it is.

        Raises:
            MessageError: It is another, or does not count.
        """
        if raw and self._link.seals.meet(raw, FROM_AGGREGATOR):
            self._hear_again = 0.0  # what it said before could not be verified

    def open(self, topic: str, raw: bytes, kind: type[Message]) -> Message:
        """What the aggregator says.

        Raises:
            MessageError: It is not from the aggregator, or cannot be read.
        """
        return self._link.seals.open(topic, raw, kind, FROM_AGGREGATOR)

    def announcement(self, topic: str, raw: bytes) -> Announcement:
        """What the aggregator announces. It also says what time it is.

        Raises:
            MessageError: It does not count: it is from somebody else, old, or of another topic.
        """
        try:
            announced = self.open(topic, raw, Announcement)
        except MessageError as error:
            if error.reason in _UNHEARD:
                self._hear_again = time.monotonic() + _HEAR_AGAIN
            raise
        if (announced.fleet, self._topics.current(announced.job)) != (self._topics.fleet, topic):
            raise MessageError("the announcement belongs to another topic", "ignore it", reason="wrong-topic")
        self._link.seals.told(FROM_AGGREGATOR, announced.issued)
        self._heard.check(announced)
        return announced

    def time(self, topic: str, raw: bytes) -> None:
        """The answer to this device's question.

        Raises:
            MessageError: It answers another one.
        """
        if self._heard.answer(self.open(topic, raw, TimeReply)):
            self._hear_again = 0.0

    def renew(self, topic: str, raw: bytes) -> None:
        """The authority wants a renewal.

        Raises:
            MessageError: The authority did not say so.
        """
        self._renewal.hurry(topic, raw)

    def renewed(self, topic: str, raw: bytes) -> bool:
        """The authority's answer; True if this device has a new credential.

        Raises:
            MessageError: The authority did not send it, or does not renew.
            OSError: It cannot be kept.
        """
        return self._renewal.accept(topic, raw)
