"""Keys that sign and keys that verify.

Ed25519 (RFC 8032) from libsodium: it takes a resident agent 1 MiB, where the library that makes certificates takes 9. A
key in a hardware token that has no Ed25519, as most TPMs, signs with ECDSA on P-256; only the aggregator verifies that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Annotated, Protocol

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

ED25519, P256 = "ed25519:", "p256:"
"""What a public key's text begins with."""

_SEED, _SIGNATURE = 32, 64
"""Bytes."""

PublicKey = Annotated[str, msgspec.Meta(pattern=r"^(ed25519:[A-Za-z0-9+/]{43}=|p256:[A-Za-z0-9+/]{87}=)\Z")]
"""Algorithm and base64 of the key: 32 bytes of Ed25519, or an uncompressed point of P-256."""

KeyId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""First half of the SHA-256 of a public key's text, in hexadecimal."""


def key_id(key: str) -> str:
    """The id of a public key."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


class Signer(Protocol):
    """A private key, wherever it is."""

    @property
    def public(self) -> str:
        """The public key, as text."""
        ...

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, 64 bytes: of Ed25519, or r and s of ECDSA with SHA-256.

        Raises:
            IdentityError: The token that holds the key does not sign.
        """
        ...


class SeedSigner:
    """A private key of Ed25519 in memory.

    Args:
        seed: Its 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.public = ED25519 + base64.b64encode(bytes(self._key.verify_key)).decode()

    @classmethod
    def generate(cls) -> SeedSigner:
        """A new key, from the system's randomness."""
        return cls(bytes(SigningKey.generate()))

    @classmethod
    def parse(cls, text: str) -> SeedSigner:
        """A key from :attr:`text`.

        Raises:
            ValueError: It is none.
        """
        seed = _decode(text.removeprefix(ED25519))
        if not text.startswith(ED25519) or len(seed) != _SEED:
            raise ValueError("not a private key of Ed25519")
        return cls(seed)

    @property
    def text(self) -> str:
        """The private key, to be written where nobody else reads it."""
        return ED25519 + base64.b64encode(bytes(self._key)).decode()

    def __repr__(self) -> str:
        return f"SeedSigner({key_id(self.public)})"  # never the key: it would stand in a log or a traceback

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``."""
        return self._key.sign(data).signature


def verifies(key: str, signature: bytes, data: bytes) -> bool:
    """Whether a signature of ``data`` was made with the private half of ``key``."""
    if len(signature) != _SIGNATURE:
        return False
    if key.startswith(P256):
        return _verifies_p256(_decode(key.removeprefix(P256)), signature, data)
    try:
        VerifyKey(_decode(key.removeprefix(ED25519))).verify(data, signature)
    except BadSignatureError:
        return False
    return True


def _verifies_p256(point: bytes, signature: bytes, data: bytes) -> bool:
    # Not at the top: devices verify Ed25519 only.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    try:
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
