"""The authority on the broker: it lets devices in, renews what they have, and says whom to trust."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.complaints import Complaints
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import Sender, sign
from fleetune.edge.protocol.identity.enrolment import CredentialRequest, RenewNow
from fleetune.edge.protocol.identity.folder import Identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Connected, Event, Link, Received
from fleetune.edge.protocol.topics import Topics
from fleetune.server.authority.admission import Admission
from fleetune.server.authority.authority import Authority

log = logging.getLogger(__name__)

_LOOK_EVERY = 1.0
"""Seconds between two looks at what other processes have changed in the authority's folder."""

_WARN_EVERY = 86400.0
"""Seconds between two words on who has to be renewed by hand."""


class Desk:
    """Answers requests while it runs.

    Args:
        authority: What it issues from.
        identity: The authority's own, for the broker.
        broker: Where the broker listens.
    """

    def __init__(self, authority: Authority, identity: Identity, broker: BrokerAddress) -> None:
        self._authority, self._admission = authority, Admission(authority)
        self._topics = Topics(authority.fleet)
        self._seals, self._complaints = Seals(identity), Complaints()
        self._said = 0  # version of the trust document
        self._warn_at = 0.0
        self._link = Link(
            broker,
            f"{authority.fleet}-authority",
            subscriptions=[
                self._topics.introduction("+"),
                self._topics.enrolment("+", "request"),
                self._topics.up("+", "renew"),
            ],
            seals=self._seals,
        )

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until the process is told to stop, or ``until`` says so.

        Raises:
            FleetuneError: There is no broker, or it refuses this side.
        """
        self._link.connect()
        log.info("lets devices into the fleet %s, and renews what they have", self._authority.fleet)
        try:
            while not until():
                for event in self._link.events(_LOOK_EVERY):
                    self._handle(event)
                self._authority.reload()
                self._say_news()
                self._warn()
        finally:
            self._link.close()

    def announce(self, renew: Mapping[str, str]) -> None:
        """Say whom to trust, and who shall renew, and leave.

        Args:
            renew: Device → id of its key that is to be replaced.

        Raises:
            FleetuneError: There is no broker, or it refuses this side.
        """
        self._link.connect()
        try:
            self._say_trust()
            for device, key in renew.items():
                topic = self._topics.down(device, "renew")
                self._link.publish(topic, sign(topic, RenewNow(key), self._authority.signer))
        finally:
            self._link.close()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._say_trust()
        elif isinstance(event, Received) and event.payload:
            levels = self._topics.split(event.topic)
            try:
                with self._authority.alone():  # nobody is revoked between the check and what is issued
                    self._say_news()
                    self._receive(levels, event)
            except MessageError as error:
                # Anybody can send requests with a token, under as many names of a token as they like.
                self._complaints.about("enrolment" if levels[:1] == ("enroll",) else event.topic, error)

    def _receive(self, levels: tuple[str, ...], event: Received) -> None:
        if levels[:1] == ("st",):
            self._seals.meet(event.payload, Sender("device", levels[1]))
        elif levels[:1] == ("enroll",):
            reply = self._admission.enrol(levels[1], event.payload)
            self._link.publish(self._topics.enrolment(levels[1], "reply"), reply)
        elif levels[:1] == ("up",):
            device = levels[1]
            request = self._seals.open(event.topic, event.payload, CredentialRequest, Sender("device", device))
            topic = self._topics.down(device, "renewed")
            self._link.publish(topic, self._admission.renew(topic, device, request))

    def _warn(self) -> None:
        """Name those who renew nothing by themselves, once a day."""
        if time.monotonic() < self._warn_at:
            return
        self._warn_at = time.monotonic() + _WARN_EVERY
        for row in self._authority.expiring():
            end = datetime.fromtimestamp(row.expires, timezone.utc)
            log.warning("what %s has expires on %s: `fleetune fleet rotate %s`", row.name, f"{end:%Y-%m-%d}", row.name)

    def _say_news(self) -> None:
        """Say whom to trust, if that has changed since it was said."""
        if self._authority.trust.version != self._said:
            self._say_trust()

    def _say_trust(self) -> None:
        self._said = self._authority.trust.version
        self._seals.hear_trust(self._authority.trust_envelope)
        self._link.publish(self._topics.trust, self._authority.trust_envelope, retain=True)
        log.info("says version %d of the trust document", self._said)
