"""A device renews its credential over the connection that it has, before the one that counts expires."""

from __future__ import annotations

import logging
import time

from fleetune.edge.agent.application import Application
from fleetune.edge.protocol.errors import IdentityError, MessageError
from fleetune.edge.protocol.identity.credential import check_current, read_signed
from fleetune.edge.protocol.identity.enrolment import CredentialReply, RenewNow
from fleetune.edge.protocol.identity.keys import key_id
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.topics import Topics

log = logging.getLogger(__name__)

_DUE_AFTER = 2 / 3
"""Share of a credential's life after which it is renewed."""

_ASK_AGAIN = 3600.0
"""Seconds without an answer after which it asks again: there is time."""

_SOON = 10.0
"""The same in the first minute, and when the authority has asked for it."""


class Renewal:
    """The credential of one device.

    Args:
        link: The device's connection; its identity is what is renewed.
        topics: Of the fleet.
    """

    def __init__(self, link: Link, topics: Topics) -> None:
        self._link, self._topics = link, topics
        self._application: Application | None = None
        self._wanted, self._ask_at, self._asked = False, 0.0, 0

    def check(self) -> None:
        """Say so if this device's own credential counts no more.

        Raises:
            IdentityError: The authority has revoked it.
        """
        identity = self._link.seals.identity
        if identity is not None:
            try:
                check_current(identity.credential, identity.trust, self._link.seals.clock.now())
            except MessageError as error:
                if error.reason == "revoked":
                    credential = identity.credential
                    raise IdentityError(
                        f"device {credential.name} is revoked: its fleet has put it out",
                        "enrol it with a new token (`fleetune fleet enroll`) if it belongs there, and start this again",
                    ) from error
                log.error("%s: %s", error.what, error.remedy)  # noqa: TRY400 - nothing is wrong with this process

    def hurry(self, topic: str, raw: bytes) -> None:
        """The authority wants it renewed now.

        Raises:
            MessageError: The authority did not say so.
        """
        if (identity := self._link.seals.identity) is not None:
            wanted = read_signed(topic, raw, RenewNow, identity.trust.authorities)
            if wanted.key == key_id(identity.credential.key):  # or it is done
                self._wanted, self._ask_at = True, 0.0

    def step(self) -> None:
        """Ask, if that is due."""
        identity, now = self._link.seals.identity, time.monotonic()
        if identity is None or now < self._ask_at:
            return
        credential = identity.credential
        due = credential.begins + _DUE_AFTER * (credential.expires - credential.begins)
        if not self._wanted and self._link.seals.clock.now() < due:
            self._ask_at = now + _SOON
            return
        self._asked += 1
        self._ask_at = now + (_SOON if self._asked < 6 else _ASK_AGAIN)
        try:
            if self._application is None:
                key = identity.key if identity.key.startswith("pkcs11:") else None
                self._application = Application(identity.folder, credential.name, key_id(credential.key), key)
            request = self._application.request
        except (IdentityError, OSError) as error:
            log.warning("the credential cannot be renewed: %s; tries again", error)
            return
        log.info("asks for a new credential")
        self._link.say(self._topics.up(credential.name, "renew"), request)

    def accept(self, topic: str, raw: bytes) -> bool:
        """Take the authority's answer; True if there is a new credential.

        Raises:
            MessageError: The authority did not send it, or it is for other keys.
            OSError: It cannot be kept; it is asked for again.
        """
        identity = self._link.seals.identity
        if identity is None or self._application is None:
            return False
        reply = read_signed(topic, raw, CredentialReply, identity.trust.authorities)
        if reply.refused:
            raise MessageError(
                f"the authority does not renew the credential ({reply.refused})",
                "see the authority's log, or enrol this device again",
                reason="renewal-refused",
            )
        self._link.seals.become(self._application.accept(reply, identity))
        self._application, self._wanted, self._asked = None, False, 0
        # One that is due at once again is a wrong clock's doing; it shall not keep the authority busy.
        life = identity.credential.expires - identity.credential.begins
        self._ask_at = time.monotonic() + (1 - _DUE_AFTER) * life
        log.info("has a new credential")
        return True
