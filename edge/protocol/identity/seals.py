"""What goes out is signed, what comes in is verified: from whom it is, for which topic, and whether it still counts.

The broker is not believed. Each message is bound to its topic by its signature, and to fleet, run, job, version and
backbone by what it says. A side without an identity signs nothing and verifies nothing: that is for one machine.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import msgspec

from fleetune.edge.protocol.errors import FleetuneError, MessageError
from fleetune.edge.protocol.identity.clock import Clock
from fleetune.edge.protocol.identity.credential import (
    Credential,
    Sender,
    Trust,
    check_current,
    check_signature,
    read_credential,
    read_trust,
    sign,
)
from fleetune.edge.protocol.identity.folder import FILE, Identity, read_identity
from fleetune.edge.protocol.identity.keys import key_id
from fleetune.edge.protocol.messages import Message, decode, open_envelope, read_envelope, seal

log = logging.getLogger(__name__)


class _Known(NamedTuple):
    """A credential, and the id of the authority's key that has signed it."""

    credential: Credential
    authority: str


def _modified(identity: Identity | None) -> int:
    """When its file was written, in nanoseconds; 0 if there is none."""
    file = None if identity is None else identity.folder / FILE
    return file.stat().st_mtime_ns if file is not None and file.exists() else 0


class Seals:
    """Signs and verifies for one member of a fleet.

    Args:
        identity: Who this is; None to do neither.

    Attributes:
        clock: The time, as this side knows it.
    """

    def __init__(self, identity: Identity | None = None) -> None:
        self._identity = identity
        self._file_of = _modified(identity)
        self.clock = Clock(identity.credential.begins if identity is not None else 0.0)
        self._known: dict[str, _Known] = {}  # by key id
        self._keys: dict[Sender, tuple[str, ...]] = {}  # of each member the newest two, oldest first
        if identity is not None:
            self.clock.passed(identity.trust.issued)
            self._learn(identity.credential, identity.envelope)  # what this side has said comes back to it

    @property
    def signed(self) -> bool:
        """Whether messages carry signatures."""
        return self._identity is not None

    @property
    def identity(self) -> Identity | None:
        """Who this is."""
        return self._identity

    def become(self, identity: Identity) -> None:
        """Go on with a renewed credential."""
        self._identity, self._file_of = identity, _modified(identity)
        self._learn(identity.credential, identity.envelope)

    def refresh(self) -> None:
        """Go on with what this machine was enrolled with since, where its folder has a newer credential."""
        mine = self._identity
        if mine is None or _modified(mine) == self._file_of:
            return
        self._file_of = _modified(mine)
        try:
            found = read_identity(mine.folder)
        except FleetuneError as error:
            log.warning("%s; goes on with the identity that it had", error)
            return
        if found.credential.sender == mine.credential.sender and found.credential.begins > mine.credential.begins:
            if found.trust.version < mine.trust.version:
                found = replace(found, trust=mine.trust, trust_envelope=mine.trust_envelope)
            self.become(found)
            log.info("goes on with a new credential: this machine was enrolled again")

    # --- out ----------------------------------------------------------------------------------------------------

    def seal(self, topic: str, message: msgspec.Struct) -> bytes:
        """Put a message for a topic into an envelope.

        Raises:
            IdentityError: The token that holds the key does not sign.
        """
        return seal(message) if self._identity is None else sign(topic, message, self._identity.signer)

    @property
    def introduction(self) -> bytes:
        """The credential that others need to verify this side's messages; empty without one."""
        return b"" if self._identity is None else self._identity.envelope

    # --- in -----------------------------------------------------------------------------------------------------

    def open(self, topic: str, raw: bytes, kind: type[Message], sender: Sender) -> Message:
        """Take a message out of its envelope, if it is from whom it must be from.

        Nothing of the body is parsed before its signature is verified.

        Raises:
            MessageError: It is too large, damaged, malformed, not signed (``unsigned``), by a key that nobody has
                introduced (``unknown-key``), by somebody else (``wrong-sender``), for another topic or altered
                (``wrong-signature``), or with a credential that does not count.
        """
        if self._identity is None:
            return open_envelope(raw, kind)
        envelope = read_envelope(raw)
        if envelope.key is None or envelope.signature is None:
            raise MessageError("the message is not signed", "give the sender an identity", reason="unsigned")
        known = self._known.get(envelope.key)
        if known is None:
            raise MessageError("signed with a key that is not known", "introduce it again", reason="unknown-key")
        credential = known.credential
        if credential.sender != sender:
            raise MessageError(
                f"signed by {credential.role} {credential.name}, who may not speak for {sender.role} {sender.name}",
                "see who sends it",
                reason="wrong-sender",
            )
        check_signature(topic, envelope, credential.key)
        check_current(credential, self._identity.trust, self._judged_at(self._identity))
        return decode(bytes(envelope.body), kind)

    def meet(self, raw: bytes, sender: Sender) -> bool:
        """Learn a member's credential; False if it was known.

        Raises:
            MessageError: It is not a credential of this fleet, of this member, or does not count.
        """
        if self._identity is None:
            return False
        credential = read_credential(raw, self._identity.trust)
        if credential.sender != sender:
            raise MessageError(
                f"a credential of {credential.role} {credential.name} where {sender.role} {sender.name} belongs",
                "see who sends it",
                reason="wrong-sender",
            )
        self.clock.passed(credential.begins)  # no authority signs for the future
        check_current(credential, self._identity.trust, self._judged_at(self._identity))
        key, keys = key_id(credential.key), self._keys.get(sender, ())
        if key in self._known and self._known[key].credential == credential:
            return False
        if keys and credential.begins < self._known[keys[-1]].credential.begins:
            raise MessageError(
                f"{sender.name} has a newer credential than this", "introduce the newest", reason="old-credential"
            )
        self._learn(credential, raw)
        return True

    def knows(self, sender: Sender) -> bool:
        """Whether a member has shown a credential."""
        return bool(self._keys.get(sender))

    def revoked_devices(self) -> frozenset[str]:
        """Devices that are revoked, and have not shown a newer credential since."""
        if self._identity is None:
            return frozenset()
        revoked = self._identity.trust.revoked.items()
        return frozenset(name for name, when in revoked if self._newest(Sender("device", name)) <= when)

    def _newest(self, sender: Sender) -> float:
        """When the newest credential of a member that is known begins; long ago if there is none."""
        keys = self._keys.get(sender)
        return self._known[keys[-1]].credential.begins if keys else -math.inf

    def _judged_at(self, identity: Identity) -> float:
        """The time that the others' credentials are judged by.

        A device's clock may be wrong, and only the aggregator, whom it would then refuse, can say so.
        """
        return self.clock.at_least if identity.credential.role == "device" else self.clock.now()

    def _learn(self, credential: Credential, envelope: bytes) -> None:
        key, known = key_id(credential.key), self._keys.get(credential.sender, ())
        self._known[key] = _Known(credential, read_envelope(envelope).key or "")
        keys = [other for other in known if other != key]
        for old in keys[:-1]:  # the one before still counts, for what is on its way
            del self._known[old]
        self._keys[credential.sender] = (*keys[-1:], key)

    def told(self, sender: Sender, when: float) -> None:
        """A member has said the time. It is believed as far as its credential reaches: a clock cannot be set to any."""
        for key in self._keys.get(sender, ())[-1:]:
            if when <= self._known[key].credential.expires:
                self.clock.told(when)

    def hear_trust(self, raw: bytes) -> Trust | None:
        """Take a newer trust document, and keep it; None if this one was known, or is older.

        Where there is no room to keep it, it counts until the end of this process; the next one hears it again.

        Raises:
            MessageError: It is not one of this fleet.
        """
        self.refresh()  # or a credential that came meanwhile would be written over
        if self._identity is None:
            return None
        trust = read_trust(raw, self._identity.trust.authorities, self._identity.trust.fleet)
        if trust.version <= self._identity.trust.version:
            return None
        self._identity = replace(self._identity, trust=trust, trust_envelope=raw)
        self.clock.passed(trust.issued)
        self._forget_others({key_id(authority) for authority in trust.authorities})
        try:
            self._identity.save()
        except OSError as error:
            log.error("version %d of the trust document cannot be kept: %s", trust.version, error)  # noqa: TRY400 - the disk
        self._file_of = _modified(self._identity)
        return trust

    def _forget_others(self, authorities: set[str]) -> None:
        """Whoever was introduced by an authority that counts no more has to be introduced again."""
        self._known = {key: known for key, known in self._known.items() if known.authority in authorities}
        of_each = {sender: tuple(key for key in keys if key in self._known) for sender, keys in self._keys.items()}
        self._keys = {sender: keys for sender, keys in of_each.items() if keys}
