"""A Debian package as a signed Mender artifact, which the update module ``deb`` installs on a board."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import read_bytes
from fleetune.edge.protocol.identity.folder import write_private
from fleetune.tools.programs import find_program, run_program
from fleetune.tools.staging import staged

_MAX_KEY = 1 << 16
_KEY = (
    "name a private key without a password: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"
)


def write_mender(deb: Path, out: Path, *, name: str, device_types: Sequence[str], key: Path) -> None:
    """Write an artifact, and hold it against the key's public half before it gets its name.

    Args:
        deb: The package.
        out: The artifact.
        name: Of the artifact, by which Mender knows it.
        device_types: The boards that take it, as Mender knows them.
        key: Private key, PEM: P-256, or RSA with 3072 bits or more.

    Raises:
        ConfigError: ``mender-artifact`` is missing, or the key is none.
        RunFailedError: It fails.
    """
    program = find_program("mender-artifact", "mender-artifact")
    types = [word for device_type in device_types for word in ("--device-type", device_type)]
    with staged(out.parent) as scratch:
        own, public, artifact = scratch / "own.pem", scratch / "public.pem", scratch / out.name
        private, shown = _halves(key)
        payload = scratch / deb.name.replace("+", "-")  # which mender-artifact allows in no name
        shutil.copyfile(deb, payload)
        write_private(own, private)
        public.write_bytes(shown)
        run_program(
            [
                *(program, "write", "module-image", "--type", "deb", "--artifact-name", name, *types),
                *("--software-name", "fleetune", "--file", payload, "--key", own, "--output-path", artifact),
            ],
            _KEY,
        )
        check_mender(artifact, public)
        artifact.replace(out)


def check_mender(artifact: Path, public: Path) -> None:
    """See that an artifact is whole, and signed.

    Raises:
        RunFailedError: It is not.
    """
    program = find_program("mender-artifact", "mender-artifact")
    run_program([program, "validate", "--key", public, artifact], f"write {artifact.name} anew")


def _halves(key: Path) -> tuple[bytes, bytes]:
    """The private key as ``mender-artifact`` reads it, which is not PKCS #8, and its public half."""
    try:
        private = load_pem_private_key(read_bytes(key, _MAX_KEY), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, FileNotFoundError) as error:
        raise ConfigError(f"--key: {key}: {error}", _KEY) from error
    if not isinstance(private, RSAPrivateKey | EllipticCurvePrivateKey):
        raise ConfigError(f"--key: {key} is of a kind that Mender does not know", _KEY)
    own = private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    return own, private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
