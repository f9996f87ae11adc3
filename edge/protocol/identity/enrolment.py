"""How a device comes into a fleet, and stays: the messages between it and the authority.

A token holds a secret that both sides know. It authenticates the request and the reply and never travels itself, so
neither the broker nor anybody between can use it; it serves one key, for a limited time. Later the device renews its
credential with a request that its current one signs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, EnrolmentError, MessageError
from fleetune.edge.protocol.identity.credential import UnixTime
from fleetune.edge.protocol.identity.keys import KeyId, PublicKey
from fleetune.edge.protocol.messages import Envelope, Message, Name, decode, encode, read_envelope

_PREFIX = "fleetune1."
MAX_TOKEN = 2048

Pem = Annotated[str, msgspec.Meta(max_length=8192)]
TokenId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Possession = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

POSSESSION = "possession"
"""Context of a signature that shows that whoever asks has the private key."""


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device needs to come into a fleet, once.

    Attributes:
        fleet: Name of the fleet.
        device: Id that the device gets.
        id: Of the token, and of the topics on which it is used.
        secret: Known to both sides.
        broker: Address of the broker for enrolment.
        expires: Until when it counts, by the authority's clock.
    """

    fleet: Name
    device: Name
    id: TokenId
    secret: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    broker: Annotated[str, msgspec.Meta(max_length=300)]
    expires: UnixTime

    @classmethod
    def make(cls, fleet: str, device: str, *, broker: str, expires: float) -> Token:
        """A new token."""
        return cls(fleet, device, secrets.token_hex(16), secrets.token_bytes(32), broker, expires)

    @property
    def text(self) -> str:
        """The token in one word."""
        return _PREFIX + base64.urlsafe_b64encode(encode(self)).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"Token({self.id} for {self.device} of {self.fleet})"  # never the secret

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token.

        Raises:
            EnrolmentError: It is none.
        """
        body = text.strip().removeprefix(_PREFIX)
        remedy = "copy all of it, as `fleetune fleet enroll` printed it"
        if len(text) > MAX_TOKEN or body == text.strip():
            raise EnrolmentError(f"the token does not begin with {_PREFIX}, or is too long", remedy)
        try:
            raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            return msgspec.json.decode(raw, type=cls)
        except (ValueError, binascii.Error, *UNDECODABLE) as error:
            raise EnrolmentError(f"the token cannot be read: {error}", remedy) from error


class CredentialRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device asks for a credential for its new keys.

    Attributes:
        device: Its id.
        key: Public key that signs its messages.
        possession: Signature of ``csr`` by that key.
        csr: Certificate signing request (PKCS #10) for TLS, in PEM.
    """

    device: Name
    key: PublicKey
    possession: Possession
    csr: Pem


Refusal = Literal["", "used-token", "expired-token", "wrong-device", "no-possession"]
"""Why the authority does not issue what was asked for; empty if it does."""


class CredentialReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the authority answers.

    Attributes:
        refused: Why not; empty if it was granted.
        credential: As the authority signed it.
        trust: The newest trust document.
        certificates: For TLS, the device's own first, in PEM.
    """

    refused: Refusal = ""
    credential: msgspec.Raw = msgspec.Raw(b"null")
    trust: msgspec.Raw = msgspec.Raw(b"null")
    certificates: Pem = ""


class RenewNow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The authority wants a device to renew its credential now.

    Attributes:
        key: Id of the key that is to be replaced.
    """

    key: KeyId


def _mac(token: Token, context: str, body: bytes) -> bytes:
    return hmac.digest(token.secret, b"\n".join((b"fleetune/1", context.encode(), body)), hashlib.sha256)


def authenticate(message: msgspec.Struct, token: Token, context: Literal["request", "reply"]) -> bytes:
    """Put a message into an envelope that a token's secret authenticates (HMAC-SHA-256, RFC 2104)."""
    body = encode(message)
    return encode(Envelope(body=msgspec.Raw(body), key=token.id, signature=_mac(token, context, body)))


def read_authenticated(raw: bytes, token: Token, kind: type[Message], context: Literal["request", "reply"]) -> Message:
    """Take a message out of such an envelope.

    Raises:
        MessageError: It is damaged, malformed, or made without the secret (``wrong-signature``).
    """
    envelope = read_envelope(raw)
    body = bytes(envelope.body)
    if not hmac.compare_digest(envelope.signature or b"", _mac(token, context, body)):
        raise MessageError(
            f"a {context} that was not made with the token's secret", "see who sends it", reason="wrong-signature"
        )
    return decode(body, kind)
