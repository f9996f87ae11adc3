"""The authority on the broker: whom it answers, whom not, and what cannot stop it."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleetune.edge.agent.csr import make_csr
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import (
    Sender,
    Trust,
    check_current,
    read_credential,
    read_signed,
    read_trust,
    sign,
    signed_bytes,
)
from fleetune.edge.protocol.identity.enrolment import (
    POSSESSION,
    CredentialReply,
    CredentialRequest,
    RenewNow,
    authenticate,
)
from fleetune.edge.protocol.identity.folder import Identity
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.messages import Envelope, decode
from fleetune.server.authority import desk
from fleetune.server.authority.authority import Authority
from fleetune.server.authority.desk import Desk
from support.guarded import DAY, GuardedFleet, TestClock, guarded_fleet
from support.mqtt5 import Peer, wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "_LOOK_EVERY", 0.05)


@pytest.fixture
def office(fleet: GuardedFleet) -> Iterator[GuardedFleet]:
    """A fleet with the device ``nano-1`` whose authority serves."""
    fleet.enrol("nano-1")
    with fleet.broker(), fleet.desk():
        yield fleet


class Device:
    """A device as far as the authority sees it: it introduces itself, and asks."""

    def __init__(self, fleet: GuardedFleet, identity: Identity, peer: Peer) -> None:
        self.fleet, self.identity, self.peer = fleet, identity, peer
        self.name = identity.credential.name
        self.authorities = fleet.authority.trust.authorities
        peer.subscribe(fleet.topics.down(self.name, "+"), fleet.topics.trust)
        self.introduce(identity.envelope)

    def introduce(self, envelope: bytes) -> None:
        self.peer.publish(self.fleet.topics.introduction(self.name), envelope, retain=True)

    def request(self, *, csr: str = "") -> CredentialRequest:
        signer, csr = SeedSigner.generate(), csr or make_csr(self.name)[1]
        return CredentialRequest(self.name, signer.public, signer.sign(signed_bytes(POSSESSION, csr.encode())), csr)

    def ask(self, *, signer: object = None, csr: str = "") -> CredentialRequest:
        asked = self.request(csr=csr)
        topic = self.fleet.topics.up(self.name, "renew")
        self.peer.publish(topic, sign(topic, asked, signer or self.identity.signer))  # type: ignore[arg-type]
        return asked

    def replies(self) -> list[CredentialReply]:
        topic = self.fleet.topics.down(self.name, "renewed")
        raws = [message.payload for message in self.peer.messages if message.topic == topic]
        authorities = (*self.authorities, *self.fleet.authority.trust.authorities)  # those of before a rotation, too
        return [read_signed(topic, raw, CredentialReply, authorities) for raw in raws]

    def answered(self, count: int = 1) -> CredentialReply:
        assert wait_until(lambda: len(self.replies()) >= count), "no answer"
        return self.replies()[count - 1]

    def trust_versions(self) -> list[int]:
        raws = [message.payload for message in self.peer.messages if message.topic == self.fleet.topics.trust]
        return [decode(bytes(decode(raw, Envelope).body), Trust).version for raw in raws]


@pytest.fixture
def device(office: GuardedFleet) -> Iterator[Device]:
    with office.peer("nano-1") as peer:
        yield Device(office, office.identity("nano-1"), peer)


def keys(fleet: GuardedFleet, name: str = "nano-1") -> list[str]:
    return [row.key for row in fleet.authority.ledger.members() if row.name == name]


def still_answers(device: Device) -> bool:
    """Whether it goes on: what came before this was passed over."""
    before = len(device.replies())
    asked = device.ask()
    return wait_until(lambda: len(device.replies()) > before) and key_id(asked.key) in keys(device.fleet)


# --- renewals -----------------------------------------------------------------------------------------------------


def test_a_device_that_asks_with_its_credential_is_answered(device: Device) -> None:
    asked = device.ask()
    assert device.answered().refused == ""
    assert keys(device.fleet)[-1] == key_id(asked.key)


def test_whoever_asks_with_another_key_is_not(office: GuardedFleet, device: Device) -> None:
    other = office.enrol("nano-2")
    for signer in (SeedSigner.generate(), other.signer, office.identity("aggregator").signer):
        device.ask(signer=signer)
    assert still_answers(device)
    assert len(device.replies()) == 1


def test_whoever_is_revoked_is_not_answered_however_fast_it_asks(office: GuardedFleet, device: Device) -> None:
    """The authority looks before each answer whether another process has changed something."""
    device.ask()
    device.answered()
    office.authority.revoke("nano-1")
    issued = len(keys(office))
    device.ask()
    assert wait_until(lambda: 2 in device.trust_versions())
    time.sleep(0.2)  # it would have been answered by now
    assert len(device.replies()) == 1
    assert len(keys(office)) == issued


class Gate(TestClock):
    """A clock that lets whoever asks for the time in another thread wait, while it is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self) -> float:
        if threading.current_thread() is not threading.main_thread() and not self.open.is_set():
            self.reached.set()
            assert self.open.wait(20)
        return super().__call__()


def test_nobody_is_revoked_between_the_check_and_the_answer(tmp_path: Path) -> None:
    """What is issued then would count as issued after the revocation, and nobody would know."""
    gate = Gate()
    with guarded_fleet(tmp_path / "fleet", "nano-1", clock=gate) as fleet:

        def revoke() -> None:
            authority = Authority(fleet.authority_folder)
            authority.revoke("nano-1")
            authority.close()

        with fleet.broker(), fleet.desk(), fleet.peer("nano-1") as peer:
            device = Device(fleet, fleet.identity("nano-1"), peer)
            gate.open.clear()
            device.ask()
            assert gate.reached.wait(20)  # it has checked, and is about to issue
            operator = threading.Thread(target=revoke, daemon=True)
            operator.start()
            operator.join(0.5)
            gate.open.set()
            operator.join(20)
            reply = device.answered()
        fleet.authority.reload()
        credential = read_credential(bytes(reply.credential), fleet.authority.trust)
        with pytest.raises(MessageError, match="is revoked"):
            check_current(credential, fleet.authority.trust, fleet.clock())


def test_a_credential_that_has_expired_renews_nothing(office: GuardedFleet, device: Device) -> None:
    now = time.time()
    raw, signer = office.forge("device", "nano-1", begins=now - 60 * DAY, expires=now - DAY)
    device.introduce(raw)
    device.ask(signer=signer)
    assert still_answers(device)
    assert len(device.replies()) == 1


def odd_csr() -> str:
    """Of a curve that no library knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    odd = der.replace(bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d030177"))
    assert odd != der
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(odd).decode()}-----END CERTIFICATE REQUEST-----\n"


def test_a_request_that_no_library_understands_is_refused_and_ends_nothing(device: Device) -> None:
    device.ask(csr=odd_csr())
    assert device.answered().refused == "no-possession"
    assert still_answers(device)


# --- enrolment ----------------------------------------------------------------------------------------------------


def test_somebody_without_a_secret_is_not_answered_and_cannot_fill_the_log(
    office: GuardedFleet, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody who reaches the port for enrolment may send what they like, under any token's name."""
    for i in range(20):
        name = f"{i:032x}"
        with office.stranger(name) as stranger:
            stranger.subscribe(office.topics.enrolment(name, "reply"))
            for raw in (b"", b"nonsense", b"{}", b"\xff" * 1000):
                stranger.publish(office.topics.enrolment(name, "request"), raw)
            assert stranger.messages == []
    assert still_answers(device)
    refused = [record.getMessage() for record in caplog.records if record.name.endswith("complaints")]
    assert len(refused) == 1, refused


def test_a_request_with_a_token_is_answered_to_whoever_holds_the_token(office: GuardedFleet, device: Device) -> None:
    token = office.authority.make_token("nano-2", 1)
    signer, csr = SeedSigner.generate(), make_csr("nano-2")[1]
    asked = CredentialRequest("nano-2", signer.public, signer.sign(signed_bytes(POSSESSION, csr.encode())), csr)
    with office.stranger(token.id) as stranger, office.stranger("listener") as listener:
        for one in (stranger, listener):
            one.subscribe(office.topics.enrolment(token.id, "reply"))
        stranger.publish(office.topics.enrolment(token.id, "request"), authenticate(asked, token, "request"))
        assert stranger.receive(1)
        assert listener.messages == []
    assert keys(office, "nano-2") == [key_id(signer.public)]


# --- whom to trust ------------------------------------------------------------------------------------------------


def test_whoever_comes_later_hears_the_newest_trust_document(office: GuardedFleet, device: Device) -> None:
    assert wait_until(lambda: device.trust_versions() == [1])
    office.authority.revoke("nano-9")  # as another process does
    assert wait_until(lambda: 2 in device.trust_versions())
    with office.peer("nano-1") as later:
        later.subscribe(office.topics.trust)
        message = later.receive(1)[0]
    assert message.retain
    trust = read_trust(message.payload, office.authority.trust.authorities, "lab")
    assert set(trust.revoked) == {"nano-9"}


def test_nothing_new_is_not_said_again(office: GuardedFleet, device: Device) -> None:
    assert wait_until(lambda: device.trust_versions() == [1])
    assert still_answers(device)
    time.sleep(0.3)
    assert device.trust_versions() == [1]


def test_it_serves_on_through_a_rotation(office: GuardedFleet, device: Device) -> None:
    office.authority.rotate()
    assert wait_until(lambda: 2 in device.trust_versions())
    assert still_answers(device)
    office.authority.finish_rotation(force=True)
    assert wait_until(lambda: 3 in device.trust_versions())
    device.ask()  # with a credential of the old key
    time.sleep(0.3)
    assert len(device.replies()) == 1


def test_an_announcement_says_whom_to_trust_and_who_shall_renew(fleet: GuardedFleet) -> None:
    """As the commands that revoke and rotate do, whether anybody serves or not."""
    identity = fleet.enrol("nano-1")
    fleet.authority.revoke("nano-9")
    with fleet.broker(), fleet.peer("nano-1") as peer:
        device = Device(fleet, identity, peer)
        Desk(fleet.authority, fleet.identity("authority"), fleet.address).announce({"nano-1": "ab" * 16})
        assert wait_until(lambda: device.trust_versions() == [2])
        topic = fleet.topics.down("nano-1", "renew")
        assert wait_until(lambda: any(message.topic == topic for message in peer.messages))
        raw = next(message.payload for message in peer.messages if message.topic == topic)
    assert read_signed(topic, raw, RenewNow, fleet.authority.trust.authorities).key == "ab" * 16


def test_members_learn_from_each_other_what_the_authority_says(office: GuardedFleet, device: Device) -> None:
    """What is retained of a device is enough for an aggregator that comes later."""
    with office.peer("aggregator") as peer:
        peer.subscribe(office.topics.introduction("+"))
        message = peer.receive(1)[0]
    seals = Seals(office.identity("aggregator"))
    assert seals.meet(message.payload, Sender("device", "nano-1"))
