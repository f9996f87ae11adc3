"""A signing key in a hardware token: OP-TEE, a TPM, a smart card; whatever speaks PKCS#11.

The key is named by a URI (RFC 7512), such as
``pkcs11:token=fleetune;object=nano-1?module-path=/usr/lib/libckteec.so&pin-source=file:/etc/fleetune/pin``.
A token with Edwards curves (PKCS#11 3.0) signs with Ed25519, any other with ECDSA on P-256.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast
from urllib.parse import parse_qs, unquote, urlsplit

from fleetune.edge.protocol.errors import ConfigError, IdentityError
from fleetune.edge.protocol.identity.folder import check_private
from fleetune.edge.protocol.identity.keys import ED25519, P256

try:
    import pkcs11
    from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
    from pkcs11.util.ec import encode_named_curve_parameters
except ImportError as error:
    raise ConfigError(
        "keys in hardware tokens need a package that is not installed", "pip install 'python-pkcs11'"
    ) from error

_ED25519_OID = "1.3.101.112"
_REMEDY = (
    "write pkcs11:token=NAME;object=NAME?module-path=/path/to/module.so&pin-source=file:/path, "
    "and look with `pkcs11-tool --module … --list-objects`"
)
_PIN_REMEDY = "write it into a file that only its owner can read, and name that: pin-source=file:/path"
_MAX_PIN_FILE = 256


class _SigningKey(Protocol):
    """What the package's private keys can do, which it adds to their class while it runs."""

    def sign(self, data: bytes, *, mechanism: Mechanism) -> bytes: ...


@dataclass(frozen=True)
class TokenKey:
    """Where a key is.

    Attributes:
        token: Label of the token.
        label: Label of the key.
        module: The token's PKCS#11 library.
        pin: File with the user's PIN; None where the token wants none.
    """

    token: str
    label: str
    module: Path
    pin: Path | None

    @classmethod
    def parse(cls, uri: str) -> TokenKey:
        """Parse a URI.

        Raises:
            ConfigError: It is not such a URI, lacks token, object or module-path, or names the PIN itself.
        """
        parts = urlsplit(uri)
        pairs = [pair.partition("=") for pair in parts.path.split(";")]
        path = {name: unquote(value) for name, _, value in pairs}
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        source = query.get("pin-source", "")
        if "pin-value" in query:
            raise ConfigError(f"the address of the key {path.get('object', '')!r} names a PIN", _PIN_REMEDY)
        if parts.scheme != "pkcs11" or not {"token", "object"} <= path.keys() or "module-path" not in query:
            raise ConfigError(f"{uri!r} does not name a key in a token", _REMEDY)
        return cls(
            path["token"],
            path["object"],
            Path(query["module-path"]),
            Path(source.removeprefix("file:")) if source else None,
        )


class TokenSigner:
    """A private key that never leaves its token.

    Args:
        uri: Where it is.
        create: Whether to make it if it is not there.

    Raises:
        ConfigError: The URI is not one.
        IdentityError: The module, the token or the key cannot be used.
        KeyExposedError: Others may read the file with the PIN.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        where = TokenKey.parse(uri)
        self._uri = uri
        try:
            token = pkcs11.lib(str(where.module)).get_token(token_label=where.token)
            self._session = _open(token, where, create=create)
            key = self._find(where.label)
            if key is None and create:
                self._create(token, where.label)
                key = self._find(where.label)
        except (pkcs11.PKCS11Error, RuntimeError, OSError) as error:
            raise IdentityError(f"{uri}: {type(error).__name__} {error}".rstrip(), _REMEDY) from error
        if key is None:
            raise IdentityError(f"{uri}: the token holds no key of this name", _REMEDY)
        self._private, self.public = key

    def _find(self, label: str) -> tuple[_SigningKey, str] | None:
        try:
            private = self._session.get_key(object_class=ObjectClass.PRIVATE_KEY, label=label)
            public = self._session.get_key(object_class=ObjectClass.PUBLIC_KEY, label=label)
        except pkcs11.NoSuchKey:
            return None
        point = bytes(public[Attribute.EC_POINT])  # DER of an octet string: two bytes, then the point
        algorithm = ED25519 if private.key_type == KeyType.EC_EDWARDS else P256
        return cast(_SigningKey, private), algorithm + base64.b64encode(point[2:]).decode()

    def _create(self, token: pkcs11.Token, label: str) -> None:
        edwards = Mechanism.EC_EDWARDS_KEY_PAIR_GEN in token.slot.get_mechanisms()
        kind, curve = (KeyType.EC_EDWARDS, _ED25519_OID) if edwards else (KeyType.EC, "secp256r1")
        parameters = self._session.create_domain_parameters(
            kind, {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}, local=True
        )
        parameters.generate_keypair(
            mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN if edwards else Mechanism.EC_KEY_PAIR_GEN,
            store=True,
            label=label,
        )

    def __repr__(self) -> str:
        return f"TokenSigner({self._uri})"

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, 64 bytes.

        Raises:
            IdentityError: The token does not sign.
        """
        try:
            if self.public.startswith(ED25519):
                return bytes(self._private.sign(data, mechanism=Mechanism.EDDSA))
            return bytes(self._private.sign(hashlib.sha256(data).digest(), mechanism=Mechanism.ECDSA))
        except pkcs11.PKCS11Error as error:
            raise IdentityError(
                f"{self._uri} does not sign: {type(error).__name__}", "see that the token is there, then start again"
            ) from error


_logged_in: dict[tuple[Path, str], pkcs11.Session] = {}
"""The session of each module and token that has logged in. A second one could not, and its end would log out all."""


def _open(token: pkcs11.Token, where: TokenKey, *, create: bool) -> pkcs11.Session:
    pin, key = _read_pin(where.pin), (where.module, where.token)
    if key not in _logged_in:
        _logged_in[key] = token.open(user_pin=pin)
    return token.open(rw=True) if create else _logged_in[key]


def _read_pin(path: Path | None) -> str | None:
    if path is None:
        return None
    check_private(path)
    if path.stat().st_size > _MAX_PIN_FILE:
        raise IdentityError(f"{path} is too large for a PIN", "write the PIN into it, and nothing else")
    return path.read_text(encoding="utf-8").strip()
