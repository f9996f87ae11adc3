"""Who a member of a fleet is, in a folder that only its owner can read.

``identity.json`` holds the credential, the private key or where a token has it, and the newest trust document;
``tls.pem`` the key and the certificates for TLS, ``roots.pem`` those that the broker's must end at. A fleet whose TLS
certificates come from somewhere else has the same two files from there.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import (
    UNDECODABLE,
    IdentityError,
    KeyExposedError,
    MessageError,
    field_and_reason,
)
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.identity.credential import Credential, Trust, read_credential, read_trust
from fleetune.edge.protocol.identity.keys import SeedSigner, Signer
from fleetune.edge.protocol.messages import MAX_MESSAGE, Envelope, encode

FILE, TLS_FILE, ROOTS_FILE = "identity.json", "tls.pem", "roots.pem"

_PKCS11 = "pkcs11:"
_MAX_FILE = 3 * MAX_MESSAGE
_MAX_PEM = 64 << 10


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    key: str
    credential: msgspec.Raw
    trust: msgspec.Raw

    def __repr__(self) -> str:
        return "_File()"  # never the key


@dataclass(frozen=True)
class Identity:
    """A member of a fleet.

    Attributes:
        folder: Where it is kept.
        credential: What the authority says of its key.
        envelope: The same, as the authority signed it.
        key: The private key, or the token's address; never shown.
        signer: What signs with it.
        trust: Whom it believes.
        trust_envelope: The same, as the authority signed it.
    """

    folder: Path
    credential: Credential
    envelope: bytes
    key: str
    signer: Signer
    trust: Trust
    trust_envelope: bytes

    def __repr__(self) -> str:
        return f"Identity({self.credential.role} {self.credential.name} of {self.credential.fleet}, {self.folder})"

    def save(self) -> None:
        """Write ``identity.json``, and ``roots.pem`` where the trust document names any.

        Raises:
            OSError: One cannot be written.
        """
        file = _File(1, self.key, msgspec.Raw(self.envelope), msgspec.Raw(self.trust_envelope))
        if self.trust.roots:  # first: once the document is kept, it is not taken again
            write_atomic(self.folder / ROOTS_FILE, "".join(self.trust.roots).encode())
        write_private(self.folder / FILE, encode(file))


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that nobody but its owner may read.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, data, mode=0o600)


def check_private(path: Path) -> None:
    """See that a file with a key is readable by its owner alone.

    Raises:
        KeyExposedError: Others may read it, or change it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise KeyExposedError(
            f"{path} holds a private key, and others may read it (mode {mode:04o})",
            f"chmod 600 {path}; if somebody else was on this machine, replace the key: `fleetune enroll` on a device, "
            "`fleetune fleet rotate` elsewhere",
        )


def make_signer(key: str) -> Signer:
    """What signs with a private key, in memory or in a token.

    Raises:
        ValueError: It is no key.
        IdentityError: The token cannot be used.
    """
    if key.startswith(_PKCS11):
        # Not at the top: it needs an extra.
        from fleetune.edge.protocol.identity.pkcs11 import TokenSigner

        return TokenSigner(key)
    return SeedSigner.parse(key)


def read_identity(folder: Path) -> Identity:
    """Read who this machine is.

    Raises:
        IdentityError: There is no identity, it is damaged, or its parts do not belong together.
        KeyExposedError: Others may read a private key.
    """
    path = folder / FILE
    if not path.is_file():
        raise IdentityError(
            f"{folder} holds no identity: {FILE} is missing",
            "make one: `fleetune enroll` on a device; for the aggregator `fleetune fleet init` has made one",
        )
    check_private(path)
    if path.stat().st_size > _MAX_FILE:
        raise IdentityError(f"{path} is larger than {_MAX_FILE >> 10} KiB", "name the folder that enrolment made")
    if (folder / TLS_FILE).is_file():
        check_private(folder / TLS_FILE)
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        if file.schema != 1:
            raise IdentityError(f"{path} has schema {file.schema}, this Fleetune reads 1", "use a newer Fleetune")
        signer = make_signer(file.key)
        unverified = msgspec.json.decode(msgspec.json.decode(file.trust, type=Envelope).body, type=Trust)
        trust = read_trust(bytes(file.trust), unverified.authorities, unverified.fleet)
        credential = read_credential(bytes(file.credential), trust)
    except UNDECODABLE as error:
        field, reason = field_and_reason(error)
        raise IdentityError(
            f"{path} is damaged: {f'field {field}: ' if field else ''}{reason}", "enrol this machine again"
        ) from error
    except MessageError as error:
        raise IdentityError(f"{path}: {error.what}", "enrol this machine again") from error
    except ValueError as error:
        raise IdentityError(f"{path}: {error}", "enrol this machine again") from error
    if signer.public != credential.key:
        raise IdentityError(f"{path}: the credential is for another key", "enrol this machine again")
    return Identity(folder, credential, bytes(file.credential), file.key, signer, trust, bytes(file.trust))
