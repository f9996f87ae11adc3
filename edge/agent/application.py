"""A device applies for a credential: new keys, a request, and what comes of it.

The keys are on disk before the request leaves: a reply that was lost, or a power cut, changes nothing, since the same
request is sent again. The keys that count until then stay where they are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, IdentityError, MessageError
from fleetune.edge.protocol.identity.credential import Sender, Trust, read_credential, read_trust, signed_bytes
from fleetune.edge.protocol.identity.enrolment import POSSESSION, CredentialReply, CredentialRequest
from fleetune.edge.protocol.identity.folder import TLS_FILE, Identity, check_private, make_signer, write_private
from fleetune.edge.protocol.identity.keys import SeedSigner
from fleetune.edge.protocol.messages import MAX_MESSAGE, Envelope, decode, encode

FILE = "application.json"
_CSR_WITHIN = 60.0
_CSR_BEGINS = "-----BEGIN CERTIFICATE REQUEST-----"


class _Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds."""

    purpose: str
    key: str
    tls_key: str
    csr: str

    @property
    def token(self) -> str | None:
        """Address of the signing key in a token; None for one in memory."""
        return self.key if self.key.startswith("pkcs11:") else None

    def __repr__(self) -> str:
        return f"_Pending({self.purpose})"  # never the keys


class Application:
    """One application; the same again after a restart, as long as it is for the same purpose.

    Args:
        folder: Of the identity.
        device: Id of the device.
        purpose: Id of the token, or of the key that is renewed.
        key: Address of the signing key in a token; None for a new one in memory.

    Raises:
        IdentityError: The file is damaged, or no key can be made.
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path, device: str, purpose: str, key: str | None = None) -> None:
        self._folder, self._device = folder, device
        pending = _read(folder / FILE)
        if pending is None or pending.purpose != purpose or pending.token != key:
            tls_key, csr = _make_csr(device)
            pending = _Pending(purpose, key or SeedSigner.generate().text, tls_key, csr)
            write_private(folder / FILE, encode(pending))
        self._pending = pending
        try:
            self._signer = make_signer(pending.key)
        except ValueError as error:
            raise IdentityError(f"{folder / FILE} is damaged: {error}", "delete it, and apply again") from error

    @property
    def request(self) -> CredentialRequest:
        """What goes to the authority."""
        possession = self._signer.sign(signed_bytes(POSSESSION, self._pending.csr.encode()))
        return CredentialRequest(self._device, self._signer.public, possession, self._pending.csr)

    def accept(self, reply: CredentialReply, before: Identity | None) -> Identity:
        """Take what the authority has granted, and keep it.

        Args:
            reply: From the authority, verified.
            before: Who the device is already; None if it comes into a fleet.

        Raises:
            MessageError: The reply is not for this application, or older than what the device has.
            OSError: It cannot be kept; then all is as it was.
        """
        raw = bytes(reply.trust)
        known = decode(bytes(decode(raw, Envelope).body), Trust) if before is None else before.trust
        newest = read_trust(raw, known.authorities, known.fleet)
        if before is not None and newest.version < before.trust.version:  # what came since must not be undone
            newest, raw = before.trust, before.trust_envelope
        credential = read_credential(bytes(reply.credential), newest)
        if credential.sender != Sender("device", self._device) or credential.key != self._signer.public:
            raise MessageError("a credential for somebody else", "apply again", reason="wrong-device")
        if before is not None and credential.begins <= before.credential.begins:
            raise MessageError("a credential that is no newer than this device's", "ignore it", reason="old-credential")
        if reply.certificates:
            write_private(self._folder / TLS_FILE, (self._pending.tls_key + reply.certificates).encode())
        identity = Identity(
            self._folder, credential, bytes(reply.credential), self._pending.key, self._signer, newest, raw
        )
        identity.save()
        (self._folder / FILE).unlink()
        return identity


def _read(path: Path) -> _Pending | None:
    if not path.is_file():
        return None
    check_private(path)
    try:
        if path.stat().st_size > MAX_MESSAGE:
            raise IdentityError(f"{path} is larger than {MAX_MESSAGE >> 10} KiB", "delete it, and apply again")
        return msgspec.json.decode(path.read_bytes(), type=_Pending)
    except UNDECODABLE as error:
        raise IdentityError(f"{path} is damaged: {error}", "delete it, and apply again") from error


def _make_csr(device: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "fleetune.edge.agent.csr", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CSR_WITHIN, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        raise IdentityError(f"no key for TLS can be made: {error}", "see that `cryptography` works here") from error
    key, begins, rest = done.stdout.partition(_CSR_BEGINS)
    return key, begins + rest
