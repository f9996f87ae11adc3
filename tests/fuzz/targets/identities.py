"""What identities are made of: what an authority signs, what a token authenticates, and what a machine keeps.

A change to a signed body is mostly signed again: what only a signature stops says nothing of the parser behind it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from fleetune.edge.agent.application import FILE as APPLICATION
from fleetune.edge.agent.application import Application
from fleetune.edge.agent.csr import make_csr
from fleetune.edge.protocol.errors import (
    AuthorityError,
    ClockError,
    ConfigError,
    EnrolmentError,
    IdentityError,
    MessageError,
    SignatureError,
)
from fleetune.edge.protocol.identity.credential import (
    Credential,
    Sender,
    Trust,
    check_current,
    issue,
    read_credential,
    read_signed,
    read_trust,
    sign,
    sign_trust,
    signed_bytes,
)
from fleetune.edge.protocol.identity.enrolment import (
    CredentialReply,
    CredentialRequest,
    RenewNow,
    Token,
    _mac,
    authenticate,
    read_authenticated,
)
from fleetune.edge.protocol.identity.folder import FILE as IDENTITY
from fleetune.edge.protocol.identity.folder import Identity, read_identity, write_private
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.identity.pkcs11 import TokenKey
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.identity.signature import ENDING, check_file, sign_file
from fleetune.edge.protocol.messages import Announcement, Envelope, encode
from fleetune.server.authority.authority import FILE as AUTHORITY
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.authority.x509 import read_csr
from fuzz.choices import Choices
from fuzz.documents import ANNOUNCEMENT
from fuzz.mutations import from_seeds, mutate_bytes, mutate_json
from fuzz.target import Target

FLEET, DEVICE = "lab", "nano-1"
BEGINS, ENDS = 1.9e9, 2.0e9
SIGNERS = {role: SeedSigner(bytes([number]) * 32) for number, role in enumerate(("authority", "aggregator", "device"))}
PUBLISHER = SeedSigner(bytes([9]) * 32)
TRUST = Trust(
    FLEET, 3, BEGINS, (SIGNERS["authority"].public,), ("-----BEGIN CERTIFICATE-----\n",), {"nano-2": BEGINS, "x": 1.0}
)
TOPIC, RENEW_TOPIC = "ft/1/lab/g/fedms/current", "ft/1/lab/dn/nano-1/renew"
KEY, CSR = make_csr(DEVICE)


def credential_of(role: str, name: str, signer: SeedSigner, begins: float = BEGINS) -> Credential:
    return Credential(FLEET, role, name, signer.public, begins, ENDS)  # type: ignore[arg-type]


MINE = credential_of("device", DEVICE, SIGNERS["device"])
LEADS = credential_of("aggregator", "aggregator", SIGNERS["aggregator"])
TRUST_ENVELOPE = sign_trust(TRUST, SIGNERS["authority"])
TOKEN = Token(FLEET, DEVICE, "ab" * 16, bytes(32), "mqtts://broker:8884", ENDS)


def identity_of(folder: Path, credential: Credential, signer: SeedSigner) -> Identity:
    envelope = issue(credential, SIGNERS["authority"])
    return Identity(folder, credential, envelope, signer.text, signer, TRUST, TRUST_ENVELOPE)


# --- what is signed -----------------------------------------------------------------------------------------------


def again(key: str, mark: Callable[[bytes], bytes]) -> Callable[[Choices, bytes], bytes]:
    """A change to a body, mostly with the signature that then belongs to it; now and then to the envelope.

    Args:
        key: Id of the key or the token.
        mark: Makes a signature.
    """

    def mutate(choices: Choices, raw: bytes) -> bytes:
        try:
            body = bytes(msgspec.json.decode(raw, type=Envelope).body)
        except (msgspec.DecodeError, ValueError, RecursionError):  # by a change before this one
            return mutate_bytes(choices, raw)
        if not choices.often():
            return mutate_json(choices, raw)
        body = mutate_json(choices, body)
        return sealed(body, key, mark(body))

    return mutate


def by(role: str, context: str) -> Callable[[Choices, bytes], bytes]:
    """Signed by a member."""
    signer = SIGNERS[role]
    return again(key_id(signer.public), lambda body: signer.sign(signed_bytes(context, body)))


def with_token(context: Any) -> Callable[[Choices, bytes], bytes]:
    """Authenticated with the token."""
    return again(TOKEN.id, lambda body: _mac(TOKEN, context, body))


def sealed(body: bytes, key: str, signature: bytes) -> bytes:
    """An envelope, whatever the body is."""
    rest = json.loads(encode(Envelope(body=msgspec.Raw(b"0"), key=key, signature=signature)))
    del rest["body"]
    return b'{"body":' + body + b"," + json.dumps(rest).encode()[1:]


def credential(data: bytes, _folder: Path) -> None:
    found = read_credential(data, TRUST)
    assert found.fleet == FLEET
    check_current(found, TRUST, BEGINS)


def trust(data: bytes, folder: Path) -> None:
    """What a device hears, keeps, and goes by from then on."""
    found = read_trust(data, TRUST.authorities, FLEET)
    seals = Seals(identity_of(folder, MINE, SIGNERS["device"]))
    newer = seals.hear_trust(data)
    assert (newer is not None) == (found.version > TRUST.version)
    assert seals.revoked_devices() <= found.revoked.keys() | TRUST.revoked.keys()
    if newer is not None:
        assert (folder / IDENTITY).is_file()


def introduction(data: bytes, folder: Path) -> None:
    seals = Seals(identity_of(folder, MINE, SIGNERS["device"]))
    leads = Sender("aggregator", "aggregator")
    assert seals.meet(data, leads)
    said = sign(TOPIC, ANNOUNCEMENT, SIGNERS["aggregator"])
    assert seals.open(TOPIC, said, Announcement, leads) == ANNOUNCEMENT


def message(data: bytes, folder: Path) -> None:
    seals = Seals(identity_of(folder, MINE, SIGNERS["device"]))
    leads = Sender("aggregator", "aggregator")
    seals.meet(issue(LEADS, SIGNERS["authority"]), leads)
    seals.open(TOPIC, data, Announcement, leads)
    seals.told(leads, BEGINS)


# --- how a device comes in ----------------------------------------------------------------------------------------


def token(data: bytes, _folder: Path) -> None:
    found = Token.parse(data.decode(errors="surrogateescape"))
    assert Token.parse(found.text) == found
    assert found.secret.hex() not in repr(found)


def mutate_token(choices: Choices, data: bytes) -> bytes:
    """A change to what a token says."""
    with suppress(ValueError):  # by a change before this one
        body = base64.urlsafe_b64decode(data.removeprefix(b"fleetune1.") + b"==")
        return b"fleetune1." + base64.urlsafe_b64encode(mutate_json(choices, body)).rstrip(b"=")
    return mutate_bytes(choices, data)


def mutate_pem(choices: Choices, data: bytes) -> bytes:
    """A change to what is between the first line and the last."""
    lines = data.strip().split(b"\n")
    with suppress(ValueError):
        der = mutate_bytes(choices, base64.b64decode(b"".join(lines[1:-1])))
        return b"\n".join((lines[0], base64.b64encode(der), lines[-1])) + b"\n"
    return mutate_bytes(choices, data)


def request(data: bytes, _folder: Path) -> None:
    asked = read_authenticated(data, TOKEN, CredentialRequest, "request")
    public = read_csr(asked.csr)
    assert public is not None


def csr(data: bytes, _folder: Path) -> None:
    read_csr(data.decode(errors="replace"))


PENDING = json.dumps({"purpose": "it", "key": SIGNERS["device"].text, "tls_key": KEY, "csr": CSR}).encode()
"""An application that waits for its answer."""


def reply(data: bytes, folder: Path) -> None:
    """A device takes what it is granted, and is itself after a restart."""
    granted = read_authenticated(data, TOKEN, CredentialReply, "reply")
    write_private(folder / APPLICATION, PENDING)
    application = Application(folder, DEVICE, "it")
    try:
        found = application.accept(granted, None)
    except MessageError:
        assert not (folder / IDENTITY).exists()
        assert (folder / APPLICATION).read_bytes() == PENDING  # it can be answered again
        raise
    assert read_identity(folder).credential == found.credential
    assert (found.credential.name, found.credential.key) == (DEVICE, SIGNERS["device"].public)


def renewal(data: bytes, folder: Path) -> None:
    """The same for a device that has a credential: it never gets an older one."""
    before = identity_of(folder, MINE, SIGNERS["device"])
    granted = read_authenticated(data, TOKEN, CredentialReply, "reply")
    write_private(folder / APPLICATION, PENDING)
    found = Application(folder, DEVICE, "it").accept(granted, before)
    assert found.credential.begins > before.credential.begins
    assert found.trust.version >= before.trust.version


def renew_now(data: bytes, _folder: Path) -> None:
    assert read_signed(RENEW_TOPIC, data, RenewNow, TRUST.authorities).key


# --- what a machine keeps -----------------------------------------------------------------------------------------


def identity(data: bytes, folder: Path) -> None:
    write_private(folder / IDENTITY, data)
    found = read_identity(folder)
    assert found.signer.public == found.credential.key
    assert found.key not in repr(found)
    found.save()
    assert read_identity(folder).credential == found.credential


def application(data: bytes, folder: Path) -> None:
    """Only such a file as is for this purpose: for another one, new keys are made, in a process of their own."""
    if json_field(data, "purpose") not in (None, "it") or json_field(data, "key") != SIGNERS["device"].text:
        return
    write_private(folder / APPLICATION, data)
    assert Application(folder, DEVICE, "it").request.key == SIGNERS["device"].public


def json_field(data: bytes, name: str) -> object:
    """A field of a document; None where that is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document.get(name) if isinstance(document, dict) else None


def authority(data: bytes, folder: Path) -> None:
    write_private(folder / AUTHORITY, data)
    Authority(folder).close()


def signature(data: bytes, folder: Path) -> None:
    file = folder / "release.img"
    file.write_bytes(b"an image")
    (folder / f"release.img{ENDING}").write_bytes(data)
    assert check_file(file, TRUST).size == 8


def key_address(data: bytes, _folder: Path) -> None:
    found = TokenKey.parse(data.decode(errors="replace"))
    assert isinstance(found.module, Path)


def kept(make: Callable[[Path], Path]) -> bytes:
    """A file as Fleetune writes it."""
    with TemporaryDirectory() as folder:
        return make(Path(folder)).read_bytes()


def _authority(folder: Path) -> Path:
    Authority.make(folder / "a", FLEET, Site(("broker",))).close()
    return folder / "a" / AUTHORITY


def _signature(folder: Path) -> Path:
    (folder / "release.img").write_bytes(b"an image")
    publisher = identity_of(folder, credential_of("publisher", "publisher", PUBLISHER), PUBLISHER)
    return sign_file(folder / "release.img", publisher, BEGINS + 1)


def _identity(folder: Path) -> Path:
    identity_of(folder, MINE, SIGNERS["device"]).save()
    return folder / IDENTITY


def _granted(**more: Any) -> bytes:
    newer = issue(credential_of("device", DEVICE, SIGNERS["device"], BEGINS + 1), SIGNERS["authority"])
    raw = CredentialReply("", msgspec.Raw(newer), msgspec.Raw(TRUST_ENVELOPE), **more)
    return authenticate(raw, TOKEN, "reply")


ASKED = CredentialRequest(
    DEVICE, SIGNERS["device"].public, SIGNERS["device"].sign(signed_bytes("possession", CSR.encode())), CSR
)
PKCS11 = b"pkcs11:token=lab;object=nano-1?module-path=/usr/lib/libckteec.so&pin-source=file:/etc/fleetune/pin"
CREDENTIALS = [issue(LEADS, SIGNERS["authority"]), issue(MINE, SIGNERS["authority"])]
TRUSTS = [TRUST_ENVELOPE, sign_trust(msgspec.structs.replace(TRUST, version=4, revoked={}), SIGNERS["authority"])]
MESSAGES = [sign(TOPIC, ANNOUNCEMENT, SIGNERS["aggregator"])]
RENEWALS = [sign(RENEW_TOPIC, RenewNow(key_id(MINE.key)), SIGNERS["authority"])]
GRANTED = [_granted(), _granted(certificates="-----BEGIN CERTIFICATE-----\n")]
REFUSED = (MessageError,)
SIGNED = by("authority", "credential"), mutate_bytes

TARGETS = [
    Target("credential", from_seeds(CREDENTIALS, *SIGNED), credential, REFUSED),
    Target("trust document", from_seeds(TRUSTS, by("authority", "trust"), mutate_bytes), trust, REFUSED),
    Target("introduction", from_seeds(CREDENTIALS, *SIGNED), introduction, REFUSED),
    Target("signed message", from_seeds(MESSAGES, by("aggregator", TOPIC), mutate_bytes), message, REFUSED),
    Target("wish to renew", from_seeds(RENEWALS, by("authority", RENEW_TOPIC), mutate_bytes), renew_now, REFUSED),
    Target("token", from_seeds([TOKEN.text.encode()], mutate_token, mutate_bytes), token, (EnrolmentError,)),
    Target(
        "request for a credential",
        from_seeds([authenticate(ASKED, TOKEN, "request")], with_token("request"), mutate_bytes),
        request,
        (MessageError, ValueError),
    ),
    Target("certificate signing request", from_seeds([CSR.encode()], mutate_pem, mutate_bytes), csr, (ValueError,)),
    Target("reply with a credential", from_seeds(GRANTED, with_token("reply"), mutate_bytes), reply, REFUSED),
    Target("renewed credential", from_seeds(GRANTED, with_token("reply"), mutate_bytes), renewal, REFUSED),
    Target("identity.json", from_seeds([kept(_identity)], mutate_json, mutate_bytes), identity, (IdentityError,)),
    Target("application.json", from_seeds([PENDING], mutate_json, mutate_bytes), application, (IdentityError,)),
    Target(
        "authority.json",
        from_seeds([kept(_authority)], mutate_json, mutate_bytes),
        authority,
        (AuthorityError, ClockError),
        slow=True,
    ),
    Target(
        "signature of a file", from_seeds([kept(_signature)], mutate_json, mutate_bytes), signature, (SignatureError,)
    ),
    Target("address of a key", from_seeds([PKCS11], mutate_bytes), key_address, (ConfigError,)),
]
