"""The authority's folder: its keys, whom it trusts, what it has issued.

Whoever has this folder can let anybody into the fleet. It belongs on a machine of the operator's own, on an encrypted
disk; only ``broker/`` and ``members/aggregator/`` are copied elsewhere, where broker and aggregator run.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import (
    UNDECODABLE,
    AuthorityError,
    ClockError,
    ConfigError,
    MessageError,
    field_and_reason,
)
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.credential import (
    AGGREGATOR,
    AUTHORITY,
    BROKER,
    PUBLISHER,
    WARN_BEFORE,
    Credential,
    Role,
    Trust,
    issue,
    read_credential,
    read_trust,
    sign_trust,
)
from fleetune.edge.protocol.identity.enrolment import Token
from fleetune.edge.protocol.identity.folder import TLS_FILE, Identity, check_private, write_private
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.messages import MAX_MESSAGE, encode
from fleetune.edge.protocol.topics import check_name
from fleetune.server.authority.ledger import FILE as LEDGER_FILE
from fleetune.server.authority.ledger import Ledger, MemberRow
from fleetune.server.authority.x509 import CertificateAuthority, CertificateKey, key_pem, make_key

FILE = "authority.json"
RESERVED = frozenset({AGGREGATOR, AUTHORITY, BROKER, PUBLISHER})
"""Names that no device may have."""

_KIT_MADE = datetime(2026, 11, 1, tzinfo=timezone.utc).timestamp()
"""No clock that is right shows an earlier time than when this was written."""

_LOCK = "lock"
_DAY = 86400.0
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")

_ROTATION = 4096
"""Bytes that a trust document keeps free for a second key and root, or no rotation could begin."""

_NAMED = 8
"""Members that are named where there are many."""

_MAX_FILE = 4 * MAX_MESSAGE


@dataclass(frozen=True)
class Lives:
    """For how long something counts, in days.

    Attributes:
        device: A device's credential and certificate; it renews them after two thirds of that.
        member: Those of the aggregator, the authority, the publisher, and the broker's certificate.
    """

    device: float = 30.0
    member: float = 365.0


@dataclass(frozen=True)
class Site:
    """Where the fleet's broker is.

    Attributes:
        hosts: Names and addresses under which devices reach it; the first is what devices are told.
        port: For members, who show a certificate.
        enrolment_port: For devices with a token.
        installed: Folder in which it finds its files; empty for the one in the authority's folder.
    """

    hosts: tuple[str, ...]
    port: int = 8883
    enrolment_port: int = 8884
    installed: str = ""

    @property
    def broker(self) -> str:
        """Address for members."""
        return str(BrokerAddress(self.hosts[0], self.port, tls=True))

    @property
    def enrolment(self) -> str:
        """Address for devices with a token."""
        return str(BrokerAddress(self.hosts[0], self.enrolment_port, tls=True))


class _Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    certificate: str
    key: str

    def __repr__(self) -> str:
        return "_Root()"  # never the key


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    fleet: str
    site: Site
    lives: Lives
    keys: tuple[str, ...]  # newest first, as in the trust document
    roots: tuple[_Root, ...]
    trust: msgspec.Raw

    def __repr__(self) -> str:
        return f"_File({self.fleet})"  # never the keys


@dataclass(frozen=True)
class Issued:
    """What a member gets.

    Attributes:
        credential: As it was signed.
        certificates: For TLS, in PEM; empty if it asked for none.
    """

    credential: bytes
    certificates: str


class Authority:
    """An authority that exists.

    Args:
        folder: Its folder.
        clock: Tells Unix time.

    Raises:
        AuthorityError: There is none, or it is damaged.
        KeyExposedError: Others may read its keys.
        ClockError: The clock shows a time before the newest trust document.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock = folder, clock
        self._take(_read(folder))
        _check_clock(clock(), self.trust.issued)
        self.ledger = Ledger(folder / LEDGER_FILE)

    def _take(self, file: _File) -> None:
        try:
            signers = [SeedSigner.parse(key) for key in file.keys]
            trust = read_trust(bytes(file.trust), tuple(signer.public for signer in signers), file.fleet)
        except (ValueError, MessageError) as error:
            what = error.what if isinstance(error, MessageError) else str(error)
            raise AuthorityError(f"{self.folder / FILE} is damaged: {what}", "restore it from a backup") from error
        self._roots = [CertificateAuthority(root.certificate.encode(), root.key.encode()) for root in file.roots]
        self._file, self._signers, self.trust = file, signers, trust

    @classmethod
    def make(
        cls, folder: Path, fleet: str, site: Site, *, lives: Lives | None = None, clock: Callable[[], float] = time.time
    ) -> Authority:
        """A new authority, in a folder of its own.

        Args:
            folder: Made, for its owner alone.
            fleet: Name of the fleet.
            site: Where its broker is.
            lives: For how long what it issues counts.
            clock: Tells Unix time.

        Raises:
            AuthorityError: The folder holds one already.
            ConfigError: The fleet's name cannot stand in a topic, or the broker cannot be where it is said to be.
            ClockError: The clock was never set.
        """
        check_name("fleet", fleet)
        _check_site(site)
        now = clock()
        _check_clock(now, _KIT_MADE)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder):
            if (folder / FILE).exists():
                raise AuthorityError(
                    f"{folder} holds an authority already: every device would have to enrol again with a new one",
                    "use that one (`fleetune fleet show`), or name another folder with --authority",
                )
            signer, (certificate, key) = SeedSigner.generate(), CertificateAuthority.make(fleet, now)
            trust = Trust(fleet, 1, now, (signer.public,), (certificate.decode(),))
            root = _Root(certificate.decode(), key.decode())
            raw = msgspec.Raw(sign_trust(trust, signer))
            file = _File(1, fleet, site, lives or Lives(), (signer.text,), (root,), raw)
            write_private(folder / FILE, encode(file))
        return cls(folder, clock)

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()

    @property
    def fleet(self) -> str:
        """Name of the fleet."""
        return self._file.fleet

    @property
    def site(self) -> Site:
        """Where the fleet's broker is."""
        return self._file.site

    @property
    def ends(self) -> float:
        """Unix time from which the root certificate counts no more, and nothing that it signed."""
        return self._roots[0].ends

    @property
    def signer(self) -> SeedSigner:
        """The private key that signs now."""
        return self._signers[0]

    @property
    def _key_id(self) -> str:
        return key_id(self.signer.public)

    @property
    def trust_envelope(self) -> bytes:
        """The newest trust document, as it was signed."""
        return bytes(self._file.trust)

    def now(self) -> float:
        """Unix time."""
        return self._clock()

    def reload(self) -> None:
        """Take what another process has changed."""
        file = _read(self.folder)
        if file != self._file:
            self._take(file)

    def make_token(self, device: str, hours: float) -> Token:
        """A token that lets a device in, once; earlier ones that were not used count no more.

        Raises:
            ConfigError: A device may not have this name.
        """
        _check_device(device)
        expires = self.now() + hours * 3600
        token = Token.make(self.fleet, device, broker=self.site.enrolment, expires=expires)
        self.ledger.add_token(token)
        return token

    # --- issuing ------------------------------------------------------------------------------------------------

    def issue(self, role: Role, name: str, key: str, certificate_key: CertificateKey | None) -> Issued:
        """Sign that a key, and one for TLS, belong to a member.

        Raises:
            ConfigError: A device may not have this name.
        """
        if role == "device":
            _check_device(name)
        begins = max(self.now(), self.trust.revoked.get(name, 0.0) + 1e-3)
        days = self._file.lives.device if role == "device" else self._file.lives.member
        credential = Credential(self.fleet, role, name, key, begins, begins + days * _DAY)
        certificates, serial = "", f"{int(begins * 1e6):x}"
        if certificate_key is not None:
            made = self._roots[0].certify(self.fleet, name, certificate_key, begins=begins, expires=credential.expires)
            certificates, serial = made.pem, made.serial
        self.ledger.add_member(MemberRow(serial, role, name, key_id(key), begins, credential.expires, self._key_id))
        return Issued(issue(credential, self.signer), certificates)

    def make_member(self, role: Role, folder: Path, name: str = "") -> Identity:
        """Make keys here, and an identity, in a folder that may be copied to the member's machine.

        Args:
            role: Its role. Devices make their keys themselves; only in a rehearsal on one machine they get them so.
            folder: Where they go.
            name: Of a device; others are called by their role.

        Raises:
            OSError: It cannot be written.
        """
        signer, tls = SeedSigner.generate(), make_key()
        issued = self.issue(role, name or role, signer.public, tls.public_key())
        credential = read_credential(issued.credential, self.trust)
        write_private(folder / TLS_FILE, key_pem(tls) + issued.certificates.encode())
        identity = Identity(folder, credential, issued.credential, signer.text, signer, self.trust, self.trust_envelope)
        identity.save()
        return identity

    def certify_broker(self) -> tuple[bytes, bytes]:
        """A key and a certificate for the broker, in PEM."""
        key, now = make_key(), self.now()
        expires = now + self._file.lives.member * _DAY
        # By the oldest root: devices that have not heard of a newer one must reach the broker to hear of it.
        made = self._roots[-1].certify_broker(
            self.fleet, self.site.hosts, key.public_key(), begins=now, expires=expires
        )
        self.ledger.add_member(MemberRow(made.serial, BROKER, BROKER, "", now, expires, self._key_id))
        return key_pem(key), made.pem.encode()

    def revocations(self) -> bytes:
        """The certificates that were revoked, for the broker, in PEM: one list for each root."""
        rows = [(row.serial, row.revoked) for row in self.ledger.members() if row.revoked is not None]
        return b"".join(root.revocations(rows, self.now()) for root in self._roots)

    # --- whom to trust ------------------------------------------------------------------------------------------

    def revoke(self, name: str) -> int:
        """Revoke all that a member has; what it gets later counts.

        Returns:
            Number of credentials.

        Raises:
            ConfigError: It is the broker or the authority, whose certificates nobody asks after.
            MessageError: More are revoked than fit one message; the key of the authority has to be replaced.
        """
        if name in (AUTHORITY, BROKER):
            raise ConfigError(
                f"{name}: devices do not ask whether its certificate is revoked",
                "give it a new one, with a root of its own: `fleetune fleet rotate authority`, later with --finish",
            )
        with self.alone():
            now = self.now()
            known = {other: when for other, when in self.trust.revoked.items() if now < self._forgotten(other, when)}
            file = self._signed(self._next(revoked=known | {name: now}), self._file, room=_ROTATION)
            count = self.ledger.revoke(name, now)
            self._save(file)
        return count

    def _forgotten(self, name: str, revoked: float) -> float:
        """When all that a member had until its revocation has expired, for whoever has heard that time."""
        lives = self._file.lives
        return revoked + (lives.member if name in RESERVED else lives.device) * _DAY + MAX_SKEW

    def rotate(self) -> None:
        """Make a new key and a new root; the old ones count too, until :meth:`finish_rotation`.

        Raises:
            AuthorityError: A rotation has begun already.
        """
        with self.alone():
            if len(self._signers) > 1:
                raise AuthorityError(
                    "a rotation of the authority's keys has begun already",
                    "finish it once all devices have renewed: `fleetune fleet rotate authority --finish`",
                )
            signer, (certificate, key) = SeedSigner.generate(), CertificateAuthority.make(self.fleet, self.now())
            root = _Root(certificate.decode(), key.decode())
            trust = self._next(
                authorities=(signer.public, *self.trust.authorities), roots=(root.certificate, *self.trust.roots)
            )
            file = self._file
            changed = msgspec.structs.replace(file, keys=(signer.text, *file.keys), roots=(root, *file.roots))
            self._save(self._signed(trust, changed))  # by the old key: nobody knows the new one yet

    def finish_rotation(self, *, force: bool = False) -> None:
        """Let go of the old key and root.

        Args:
            force: Whether those who have nothing of the new ones are left behind; they have to enrol again.

        Raises:
            AuthorityError: No rotation has begun, or somebody would be left behind.
        """
        with self.alone():
            if len(self._signers) < 2:
                raise AuthorityError("no rotation has begun", "begin one: `fleetune fleet rotate authority`")
            behind = self._behind()
            if behind and not force:
                more = f" and {len(behind) - _NAMED} more" if len(behind) > _NAMED else ""
                raise AuthorityError(
                    f"{', '.join(behind[:_NAMED])}{more}: what they have is of the old keys, and would count no more",
                    "have them renew (`fleetune fleet rotate NAME …`), or wait until they have; or leave them behind "
                    "with --force",
                )
            # What was revoked before the new key was there is of the old one, too.
            revoked = {name: when for name, when in self.trust.revoked.items() if when > self._roots[0].begins}
            trust = self._next(authorities=self.trust.authorities[:1], roots=self.trust.roots[:1], revoked=revoked)
            self._signers = self._signers[:1]
            changed = msgspec.structs.replace(self._file, keys=self._file.keys[:1], roots=self._file.roots[:1])
            self._save(self._signed(trust, changed))

    def _behind(self) -> list[str]:
        """Members that have nothing of the newest key; what the broker and the authority have is made anew with it."""
        rows = [row for row in self.ledger.members() if row.revoked is None and row.expires > self.now()]
        newest = {row.name: row.authority for row in rows if row.name not in (AUTHORITY, BROKER)}
        return sorted(name for name, authority in newest.items() if authority != self._key_id)

    def expiring(self) -> list[MemberRow]:
        """Those who renew nothing by themselves, as devices do, and have less than a month left."""
        newest = {row.name: row for row in self.ledger.members() if row.role != "device"}.values()
        return [row for row in newest if row.revoked is None and row.expires < self.now() + WARN_BEFORE]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process changes the folder at a time, and begins with what the others have left."""
        with _alone(self.folder):
            self.reload()
            yield

    def _next(self, **changes: object) -> Trust:
        return msgspec.structs.replace(self.trust, version=self.trust.version + 1, issued=self.now(), **changes)

    def _signed(self, trust: Trust, file: _File, *, room: int = 0) -> _File:
        """The file with a trust document that is signed with a key that the one before it names."""
        return msgspec.structs.replace(file, trust=msgspec.Raw(sign_trust(trust, self._signers[-1], room=room)))

    def _save(self, file: _File) -> None:
        write_private(self.folder / FILE, encode(file))
        self._take(file)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_site(site: Site) -> None:
    """See that a broker can be there.

    Raises:
        ConfigError: It cannot.
    """
    for host in site.hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _HOST.match(host):
                raise ConfigError(
                    f"host: {host!r} is neither a name nor an address",
                    "write a name as DNS has it, in ASCII, or an IP address",
                ) from None
    if site.port == site.enrolment_port:
        raise ConfigError(f"port: {site.port} cannot be for members and for enrolment", "choose two ports")


def _check_device(name: str) -> None:
    check_name("device", name)
    if name in RESERVED:
        raise ConfigError(f"device: the name {name!r} is reserved", "give the device another id")


def _check_clock(now: float, passed: float) -> None:
    """See that the clock does not show a time that has passed for sure.

    Raises:
        ClockError: It does.
    """
    if now < passed - MAX_SKEW:
        shown, known = (datetime.fromtimestamp(when, timezone.utc) for when in (now, passed))
        raise ClockError(
            f"this machine's clock shows {shown:%Y-%m-%d %H:%M}, and {known:%Y-%m-%d %H:%M} has passed for sure",
            "set it: `timedatectl set-ntp true`, or `date -s`",
        )


def _read(folder: Path) -> _File:
    path = folder / FILE
    if not path.is_file():
        raise AuthorityError(
            f"{folder} holds no authority: {FILE} is missing", "make one with `fleetune fleet init`, or name its folder"
        )
    check_private(path)
    if path.stat().st_size > _MAX_FILE:
        raise AuthorityError(f"{path} is larger than {_MAX_FILE >> 10} KiB", "restore it from a backup")
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except UNDECODABLE as error:
        field, reason = field_and_reason(error)
        what = f"{path} is damaged: {f'field {field}: ' if field else ''}{reason}"
        raise AuthorityError(what, "restore it from a backup") from error
    if file.schema != 1:
        raise AuthorityError(f"{path} has schema {file.schema}, this Fleetune reads 1", "use a newer Fleetune")
    return file
