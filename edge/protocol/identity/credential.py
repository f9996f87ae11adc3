"""Credentials: what the authority says of a key, and the document that says whom to believe.

An authority signs that a key belongs to a member of the fleet, for a time. The trust document names the authority's own
keys, the roots of the TLS certificates, and whose credentials no longer count; it is signed by a key of the one before
it, and its version only grows. So a key of the authority can be replaced, and nobody can bring back what was revoked.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.keys import PublicKey, Signer, key_id, verifies
from fleetune.edge.protocol.messages import MAX_MESSAGE, Envelope, Message, Name, decode, encode

Role = Literal["device", "aggregator", "authority", "publisher"]
"""What a member may do: send updates, lead rounds, issue credentials over the network, sign packs."""

AGGREGATOR, AUTHORITY, BROKER, PUBLISHER = "aggregator", "authority", "broker", "publisher"
"""Names of the members that are no devices; no device has one of them."""

_CREDENTIAL, _TRUST = "credential", "trust"

UnixTime = Annotated[float, msgspec.Meta(ge=0, le=2**40)]
"""Seconds since 1970."""


class Sender(NamedTuple):
    """Who a message must be from."""

    role: Role
    name: str


class Credential(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key belongs to a member of a fleet.

    Attributes:
        fleet: Name of the fleet.
        role: What the member may do.
        name: Id of the device, or the role.
        key: Its public key.
        begins: From when on it counts; it was issued then.
        expires: Until when.
    """

    fleet: Name
    role: Role
    name: Name
    key: PublicKey
    begins: UnixTime
    expires: UnixTime

    @property
    def sender(self) -> Sender:
        """Whose it is."""
        return Sender(self.role, self.name)


WARN_BEFORE = 30 * 86400.0
"""Seconds before its end in which a credential is named that nobody renews but its operator."""


class Trust(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom to believe.

    Attributes:
        fleet: Name of the fleet.
        version: Grows with every change.
        issued: When it was signed.
        authorities: Public keys that sign credentials, and the next trust document.
        roots: Certificates that TLS certificates of the fleet end at, in PEM.
        revoked: Name of a member → time; of its credentials those count that were issued later.
    """

    fleet: Name
    version: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    issued: UnixTime
    authorities: Annotated[tuple[PublicKey, ...], msgspec.Meta(min_length=1, max_length=4)]
    roots: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=8192)], ...], msgspec.Meta(max_length=4)] = ()
    revoked: dict[Name, UnixTime] = {}


def signed_bytes(context: str, body: bytes) -> bytes:
    """What a signature covers: a text has one meaning, so that none can be taken for another."""
    return b"\n".join((b"fleetune/1", context.encode(), body))


def sign(context: str, message: msgspec.Struct, signer: Signer) -> bytes:
    """Put a message into a signed envelope.

    Args:
        context: What it is: a topic, or the kind of a document.
        message: The message.
        signer: The private key.
    """
    body = encode(message)
    signature = signer.sign(signed_bytes(context, body))
    return encode(Envelope(body=msgspec.Raw(body), key=key_id(signer.public), signature=signature))


def check_signature(context: str, envelope: Envelope, key: str) -> None:
    """See that an envelope was signed with a key, for this context.

    Raises:
        MessageError: It was not (``wrong-signature``).
    """
    signature = envelope.signature or b""
    if not verifies(key, signature, signed_bytes(context, bytes(envelope.body))):
        raise MessageError("the signature does not fit", "send it again, as it was", reason="wrong-signature")


def issue(credential: Credential, signer: Signer) -> bytes:
    """Sign a credential with an authority's key."""
    return sign(_CREDENTIAL, credential, signer)


def sign_trust(trust: Trust, signer: Signer, *, room: int = 0) -> bytes:
    """Sign a trust document with a key of the authority.

    Args:
        trust: The document.
        signer: The key.
        room: Bytes that it must leave free for what comes next.

    Raises:
        MessageError: It names too many for one message.
    """
    raw = sign(_TRUST, trust, signer)
    if len(raw) > MAX_MESSAGE - room:
        raise MessageError(
            f"a trust document of {len(raw)} bytes exceeds {MAX_MESSAGE - room}",
            "replace the authority's key: credentials that it signed need not be revoked one by one",
            reason="message-too-large",
        )
    return raw


def read_credential(raw: bytes, trust: Trust) -> Credential:
    """Read a credential that one of the fleet's authorities signed; time and revocation are another question.

    Raises:
        MessageError: It is none (``damaged``, ``malformed``), or an authority of this fleet did not sign it
            (``unknown-authority``, ``wrong-signature``, ``wrong-fleet``).
    """
    credential = read_signed(_CREDENTIAL, raw, Credential, trust.authorities)
    if credential.fleet != trust.fleet:
        raise MessageError(
            f"a credential of the fleet {credential.fleet}", f"enrol it in {trust.fleet}", reason="wrong-fleet"
        )
    return credential


def read_trust(raw: bytes, authorities: tuple[str, ...], fleet: str) -> Trust:
    """Read a trust document.

    Args:
        raw: Its envelope.
        authorities: Keys that may have signed it: those of the document before, or of a token.
        fleet: Name of the fleet.

    Raises:
        MessageError: As :func:`read_credential`.
    """
    trust = read_signed(_TRUST, raw, Trust, authorities)
    if trust.fleet != fleet:
        raise MessageError(f"a trust document of the fleet {trust.fleet}", "none", reason="wrong-fleet")
    return trust


def read_signed(context: str, raw: bytes, kind: type[Message], authorities: tuple[str, ...]) -> Message:
    """Read what an authority has signed.

    Args:
        context: What it is, as for :func:`sign`.
        raw: Its envelope.
        kind: What is in it.
        authorities: Keys that may have signed it.

    Raises:
        MessageError: As :func:`read_credential`.
    """
    envelope = decode(raw, Envelope)
    key = next((key for key in authorities if key_id(key) == envelope.key), None)
    if key is None:
        raise MessageError(
            f"{context}: no authority of the fleet signed it",
            "enrol it with this fleet's authority",
            reason="unknown-authority",
        )
    check_signature(context, envelope, key)
    return decode(bytes(envelope.body), kind)


def check_current(credential: Credential, trust: Trust, now: float) -> None:
    """See that a credential counts now.

    Raises:
        MessageError: It has expired (``expired-credential``) or was revoked (``revoked``).
    """
    who = f"the credential of {credential.role} {credential.name}"
    if trust.revoked.get(credential.name, -1.0) >= credential.begins:
        raise MessageError(f"{who} is revoked", "nothing, if it was meant; or enrol it again", reason="revoked")
    if now > credential.expires + MAX_SKEW:
        raise MessageError(f"{who} has expired", "renew it, or enrol it again", reason="expired-credential")
