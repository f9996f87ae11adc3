"""A device renews what it has: over its connection, whatever is lost on the way, and whoever would like to help."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.agent import application as application_module
from fleetune.edge.agent.application import FILE as APPLICATION
from fleetune.edge.agent.application import Application
from fleetune.edge.agent.renewal import Renewal
from fleetune.edge.protocol.errors import FleetuneError, IdentityError, KeyExposedError, MessageError
from fleetune.edge.protocol.identity import folder
from fleetune.edge.protocol.identity.credential import Sender, read_signed, sign
from fleetune.edge.protocol.identity.enrolment import CredentialReply, CredentialRequest, RenewNow
from fleetune.edge.protocol.identity.folder import TLS_FILE, Identity, read_identity
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence
from fleetune.server.authority import desk
from fleetune.server.authority.admission import Admission
from fleetune.server.authority.mosquitto import write_broker
from support.guarded import DAY, GuardedBroker, GuardedFleet, SoftToken, quick_keys
from support.mqtt5 import wait_until

NANO_1 = Sender("device", "nano-1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(desk, "_LOOK_EVERY", 0.1)
    with quick_keys():  # an agent's process makes its own
        yield


@pytest.fixture
def broker(fleet: GuardedFleet) -> Iterator[GuardedBroker]:
    with fleet.broker() as broker:
        yield broker


def enrol_long_ago(fleet: GuardedFleet, device: str, key: str | None = None) -> Identity:
    """Its credential has been due for five days."""
    fleet.clock.ahead = -25 * DAY
    identity = fleet.enrol(device, key=key)
    fleet.clock.ahead = 0.0
    return identity


def key(identity: Identity) -> str:
    return key_id(identity.credential.key)


def keys_in_ledger(fleet: GuardedFleet, device: str) -> list[str]:
    """Of what it was issued, the oldest first; whoever asks twice has two credentials for one key."""
    return list(dict.fromkeys(row.key for row in fleet.authority.ledger.members() if row.name == device))


# --- as it should be ----------------------------------------------------------------------------------------------


def test_an_agent_renews_over_its_connection_and_goes_on_with_the_new_keys(
    fleet: GuardedFleet, broker: GuardedBroker
) -> None:
    before = enrol_long_ago(fleet, "nano-1")
    tls_before = (fleet.home("nano-1") / TLS_FILE).read_bytes()
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("has a new credential")
        agent.wait_until(lambda: agent.output.count("connected to") == 2)
        after = fleet.identity("nano-1")
        assert keys_in_ledger(fleet, "nano-1") == [key(before), key(after)]
        assert after.credential.expires > time.time() + 29 * DAY
        assert (fleet.home("nano-1") / TLS_FILE).read_bytes() != tls_before
        assert not (fleet.home("nano-1") / APPLICATION).exists()
        aggregator = fleet.seals("aggregator")
        assert wait_until(lambda: hears_presence(fleet, aggregator))
    assert keys_in_ledger(fleet, "nano-1") == [key(before), key(after)]  # once was enough


def hears_presence(fleet: GuardedFleet, aggregator: Seals) -> bool:
    """Whether what the broker retains of the device is signed with a key that its credential is for."""
    topics = fleet.topics.introduction("nano-1"), fleet.topics.presence("nano-1")
    with fleet.peer("aggregator") as peer:
        peer.subscribe(*topics)
        introduction, presence = (message.payload for message in peer.receive(2)[-2:])
    aggregator.meet(introduction, NANO_1)
    newest = key(fleet.identity("nano-1"))
    opened = aggregator.open(topics[1], presence, Presence, NANO_1)
    return opened.state == "online" and json.loads(presence)["key"] == newest


def test_one_that_has_time_is_not_renewed(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    fleet.clock.ahead = -19 * DAY
    fleet.enrol("nano-1")
    fleet.clock.ahead = 0.0
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("waits for a round")
        with fleet.link("authority", fleet.topics.up("+", "renew")) as link:
            asked = [event for _ in range(5) for event in link.events(0.1) if isinstance(event, Received)]
    assert asked == []


def test_an_operator_may_want_it_now(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    before = fleet.enrol("nano-1")
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("waits for a round")
        topic = fleet.topics.down("nano-1", "renew")
        with fleet.link("authority") as link:
            link.publish(topic, sign(topic, RenewNow(key(before)), fleet.authority.signer))
            agent.wait_for("has a new credential")
            link.publish(topic, sign(topic, RenewNow(key(before)), fleet.authority.signer))  # the broker, once more
            agent.wait_until(lambda: agent.output.count("connected to") == 2)
        assert keys_in_ledger(fleet, "nano-1") == [key(before), key(fleet.identity("nano-1"))]


def test_a_key_in_a_hardware_token_is_renewed_as_often_as_it_takes(
    fleet: GuardedFleet, broker: GuardedBroker, soft_token: SoftToken
) -> None:
    """The key stays; its credential and the certificate for TLS are new."""
    before = enrol_long_ago(fleet, "nano-1", key=soft_token_key(soft_token))
    topic = fleet.topics.down("nano-1", "renew")
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("has a new credential")
        first = fleet.identity("nano-1")
        with fleet.link("authority") as link:
            agent.wait_until(lambda: agent.output.count("connected to") == 2)
            link.publish(topic, sign(topic, RenewNow(key(before)), fleet.authority.signer))
            agent.wait_until(lambda: agent.output.count("has a new credential") == 2)
        agent.wait_until(lambda: agent.output.count("connected to") == 3)
        assert wait_until(lambda: hears_presence(fleet, fleet.seals("aggregator")))
    after = fleet.identity("nano-1")
    assert key(before) == key(first) == key(after)
    assert before.credential.begins < first.credential.begins < after.credential.begins


def soft_token_key(soft_token: SoftToken) -> str:
    from fleetune.edge.protocol.identity.pkcs11 import TokenSigner

    uri = soft_token.uri("renewed")
    TokenSigner(uri, create=True)
    return uri


# --- what may be lost ---------------------------------------------------------------------------------------------


def test_an_authority_that_is_away_is_asked_again(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    enrol_long_ago(fleet, "nano-1")
    with fleet.agent("nano-1") as agent:
        agent.wait_until(lambda: agent.output.count("asks for a new credential") >= 2)
        assert "has a new credential" not in agent.output
        with fleet.desk():
            agent.wait_for("has a new credential")


def test_an_agent_that_is_killed_before_the_reply_comes_asks_for_the_same_again(
    fleet: GuardedFleet, broker: GuardedBroker
) -> None:
    """The authority has issued, and the reply is lost: nothing is, as long as the keys are the same."""
    before = enrol_long_ago(fleet, "nano-1")
    with fleet.link("authority", fleet.topics.up("+", "renew")) as link, fleet.agent("nano-1") as agent:
        request = next(event for event in forever(link) if isinstance(event, Received))
        agent.kill()
    seals = fleet.seals("authority")
    seals.meet(before.envelope, NANO_1)
    asked = seals.open(request.topic, request.payload, CredentialRequest, NANO_1)
    Admission(fleet.authority).renew(fleet.topics.down("nano-1", "renewed"), "nano-1", asked)
    assert key(fleet.identity("nano-1")) == key(before)
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("has a new credential")
    assert key(fleet.identity("nano-1")) == key_id(asked.key)
    assert keys_in_ledger(fleet, "nano-1") == [key(before), key_id(asked.key)]


def forever(link: Link) -> Iterator[object]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        yield from link.events(0.1)


@pytest.mark.parametrize("step", ["tls", "identity"])
def test_a_power_cut_in_the_middle_of_a_renewal_locks_nobody_out(
    fleet: GuardedFleet, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Of the files that change, each may be the last."""
    before = fleet.enrol("nano-1")
    application, reply = applied(fleet, before)
    cut(monkeypatch, after=["tls", "identity"].index(step) + 1)
    with pytest.raises(PowerCut):
        application.accept(reply, before)
    monkeypatch.undo()
    held = fleet.identity("nano-1")
    fleet.context("nano-1")  # key and certificate still belong together
    assert key(held) == (key(before) if step == "tls" else key_id(application.request.key))
    again, reply = applied(fleet, held)
    assert key(again.accept(reply, held)) == key(fleet.identity("nano-1"))


class PowerCut(BaseException):
    """Nothing is done any more."""


def cut(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The power goes when so many files with a key were written, or when one is removed."""
    written: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if len(written) == after:
            raise PowerCut
        written.append(path)
        real(path, data)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PowerCut

    real = folder.write_private
    monkeypatch.setattr(folder, "write_private", write)
    monkeypatch.setattr(application_module, "write_private", write)
    monkeypatch.setattr(Path, "unlink", unlink)


def applied(fleet: GuardedFleet, identity: Identity, *, uri: str | None = None) -> tuple[Application, CredentialReply]:
    """An application for a renewal, and what the authority answers."""
    name = identity.credential.name
    application = Application(identity.folder, name, key(identity), uri)
    raw = Admission(fleet.authority).renew("t", name, application.request)
    return application, read_signed("t", raw, CredentialReply, fleet.authority.trust.authorities)


# --- what does not count ------------------------------------------------------------------------------------------


@pytest.fixture
def member(fleet: GuardedFleet) -> Identity:
    return fleet.enrol("nano-1")


@pytest.fixture
def link(fleet: GuardedFleet, member: Identity) -> Link:
    """Of the device; it need not be connected."""
    return Link(fleet.address, "nano-1", subscriptions=["t"], seals=Seals(member))


@pytest.fixture
def renewal(fleet: GuardedFleet, link: Link) -> Renewal:
    return Renewal(link, fleet.topics)


def refused(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MessageError) as caught:
        call(*arguments)
    return caught.value.reason


def asking(fleet: GuardedFleet, member: Identity, renewal: Renewal) -> CredentialRequest:
    """It asks; what it asks for."""
    topic = fleet.topics.down("nano-1", "renew")
    renewal.hurry(topic, sign(topic, RenewNow(key(member)), fleet.authority.signer))
    renewal.step()
    return Application(member.folder, "nano-1", key(member)).request


def test_nobody_but_the_authority_makes_a_device_renew(fleet: GuardedFleet, member: Identity, renewal: Renewal) -> None:
    topic, other = fleet.topics.down("nano-1", "renew"), fleet.topics.down("nano-2", "renew")
    word = RenewNow(key(member))
    for signer in (fleet.identity("aggregator").signer, member.signer, SeedSigner.generate()):
        assert refused(renewal.hurry, topic, sign(topic, word, signer)) == "unknown-authority"
    assert refused(renewal.hurry, topic, sign(other, word, fleet.authority.signer)) == "wrong-signature"
    renewal.hurry(topic, sign(topic, RenewNow("0" * 32), fleet.authority.signer))  # of a key that was replaced
    renewal.step()
    assert not (member.folder / APPLICATION).exists()


def test_nobody_but_the_authority_grants_a_renewal(fleet: GuardedFleet, member: Identity, renewal: Renewal) -> None:
    request, topic = asking(fleet, member, renewal), fleet.topics.down("nano-1", "renewed")
    granted = Admission(fleet.authority).renew(topic, "nano-1", request)
    reply = read_signed(topic, granted, CredentialReply, fleet.authority.trust.authorities)
    for signer in (fleet.identity("aggregator").signer, member.signer, SeedSigner.generate()):
        assert refused(renewal.accept, topic, sign(topic, reply, signer)) == "unknown-authority"
    elsewhere = sign(fleet.topics.down("nano-2", "renewed"), reply, fleet.authority.signer)
    assert refused(renewal.accept, topic, elsewhere) == "wrong-signature"
    assert read_identity(member.folder).credential == member.credential
    assert renewal.accept(topic, granted)
    assert read_identity(member.folder).credential.key == request.key


def test_an_answer_that_nobody_waits_for_changes_nothing(
    fleet: GuardedFleet, member: Identity, renewal: Renewal
) -> None:
    """The authority answers twice, or the broker does."""
    request, topic = asking(fleet, member, renewal), fleet.topics.down("nano-1", "renewed")
    first, second = (Admission(fleet.authority).renew(topic, "nano-1", request) for _ in range(2))
    assert renewal.accept(topic, first)
    held = read_identity(member.folder)
    assert not renewal.accept(topic, second)
    assert not renewal.accept(topic, first)
    assert read_identity(member.folder).credential == held.credential


def test_a_credential_for_another_key_or_device_is_refused(fleet: GuardedFleet, member: Identity) -> None:
    application, _ = applied(fleet, member)
    other, theirs = applied(fleet, fleet.enrol("nano-2"))
    assert refused(application.accept, theirs, member) == "wrong-device"
    stolen = fleet.authority.issue("device", "nano-2", application.request.key, None).credential
    reply = CredentialReply(credential=msgspec.Raw(stolen), trust=theirs.trust)
    assert refused(application.accept, reply, member) == "wrong-device"
    assert refused(other.accept, reply, fleet.identity("nano-2")) == "wrong-device"


def test_a_key_in_a_token_does_not_get_an_old_credential_again(fleet: GuardedFleet, soft_token: SoftToken) -> None:
    """It is for the same key, and the broker has kept it: with an old certificate the device would be locked out."""
    uri = soft_token_key(soft_token)
    member = fleet.enrol("nano-1", key=uri)
    application, old = applied(fleet, member, uri=uri)
    renewed = application.accept(old, member)
    waiting, new = applied(fleet, renewed, uri=uri)
    tls = (member.folder / TLS_FILE).read_bytes()
    assert refused(waiting.accept, old, renewed) == "old-credential"
    assert (member.folder / TLS_FILE).read_bytes() == tls
    assert waiting.accept(new, renewed).credential.begins > renewed.credential.begins
    fleet.context("nano-1")


def test_a_reply_that_comes_late_does_not_bring_back_whom_the_authority_has_revoked(
    fleet: GuardedFleet, member: Identity
) -> None:
    """A broker may hold it back until the revocation was heard."""
    application, reply = applied(fleet, member)
    seals = Seals(member)
    fleet.authority.revoke("aggregator")
    seals.hear_trust(fleet.authority.trust_envelope)
    assert seals.identity is not None
    renewed = application.accept(reply, seals.identity)
    for identity in (renewed, read_identity(member.folder)):
        assert identity.trust.version == 2
        assert "aggregator" in identity.trust.revoked


def test_a_device_that_is_put_out_says_so_and_goes_on_once_it_is_enrolled_again(
    fleet: GuardedFleet, broker: GuardedBroker
) -> None:
    fleet.enrol("nano-1")
    with fleet.agent("nano-1") as agent:
        agent.wait_for("waits for a round")
        fleet.authority.revoke("nano-1")
        fleet.write_revocations(broker)
        agent.wait_for("the broker drops what this device says (Not authorized)")
        agent.wait_for("this machine's certificate is revoked; tries again (enrol it again with a new token")
        new = fleet.enrol("nano-1")  # beside the agent, which waits
        fleet.write_revocations(broker)
        agent.wait_for("goes on with a new credential")
        agent.wait_until(lambda: agent.output.count("connected to") == 2)
        assert fleet.identity("nano-1").credential == new.credential


def test_a_device_whose_own_authority_has_put_it_out_ends_and_starts_no_more(
    fleet: GuardedFleet, broker: GuardedBroker
) -> None:
    fleet.enrol("nano-1")
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("waits for a round")
        fleet.authority.revoke("nano-1")  # and the broker was not told
        agent.wait_for("device nano-1 is revoked: its fleet has put it out")
        agent.wait_until(lambda: agent.process.poll() is not None)
    with fleet.agent("nano-1") as again:
        again.wait_for("device nano-1 is revoked: its fleet has put it out")
        assert "connected to" not in again.output


def test_what_comes_from_enrolment_is_not_written_over(fleet: GuardedFleet) -> None:
    running = Seals(fleet.enrol("nano-1"))
    fleet.authority.revoke("nano-1")
    new = fleet.enrol("nano-1")
    fleet.authority.revoke("aggregator")  # a newer document than enrolment brought
    running.hear_trust(fleet.authority.trust_envelope)
    kept = fleet.identity("nano-1")
    assert kept.credential == new.credential
    assert kept.trust.version == fleet.authority.trust.version
    assert running.identity is not None
    assert running.identity.credential == new.credential


def test_a_newer_trust_document_in_a_reply_is_taken(fleet: GuardedFleet, member: Identity) -> None:
    fleet.authority.revoke("aggregator")
    application, reply = applied(fleet, member)
    assert application.accept(reply, member).trust.version == 2


def test_a_refusal_is_said_and_the_old_credential_stays(
    fleet: GuardedFleet, member: Identity, renewal: Renewal
) -> None:
    asking(fleet, member, renewal)
    topic = fleet.topics.down("nano-1", "renewed")
    raw = sign(topic, CredentialReply("no-possession"), fleet.authority.signer)
    with pytest.raises(MessageError, match="no-possession"):
        renewal.accept(topic, raw)
    assert read_identity(member.folder).credential == member.credential


def test_a_clock_that_is_years_ahead_renews_once_and_not_for_ever(
    fleet: GuardedFleet, member: Identity, link: Link, renewal: Renewal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it gets has expired by that clock, too."""
    link.seals.clock.set(time.time() + 5000 * DAY)
    renewal.step()
    topic = fleet.topics.down("nano-1", "renewed")
    request = Application(member.folder, "nano-1", key(member)).request
    assert renewal.accept(topic, Admission(fleet.authority).renew(topic, "nano-1", request))
    later = time.monotonic() + 9 * DAY
    monkeypatch.setattr("fleetune.edge.agent.renewal.time", Still(later))
    renewal.step()
    assert not (member.folder / APPLICATION).exists()
    monkeypatch.setattr("fleetune.edge.agent.renewal.time", Still(later + 2 * DAY))
    renewal.step()
    assert (member.folder / APPLICATION).exists()


class Still:
    """A monotonic clock that stands still."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now


# --- the application ----------------------------------------------------------------------------------------------


def test_an_application_is_its_owners_alone_and_shows_no_key(fleet: GuardedFleet, member: Identity) -> None:
    application, _ = applied(fleet, member)
    path = member.folder / APPLICATION
    assert path.stat().st_mode & 0o777 == 0o600
    pending = json.loads(path.read_text())
    shown = f"{application!r} {vars(application)}"
    assert pending["key"].removeprefix("ed25519:") not in shown
    assert pending["tls_key"].splitlines()[1] not in shown
    path.chmod(0o644)
    with pytest.raises(KeyExposedError):
        Application(member.folder, "nano-1", key(member))


def test_an_application_stays_the_same_for_the_same_purpose_alone(fleet: GuardedFleet, member: Identity) -> None:
    first = Application(member.folder, "nano-1", key(member)).request
    assert Application(member.folder, "nano-1", key(member)).request == first
    assert Application(member.folder, "nano-1", "another").request.key != first.key


def test_an_application_is_made_anew_where_its_key_shall_be_in_a_token(
    fleet: GuardedFleet, member: Identity, soft_token: SoftToken
) -> None:
    """The one before was made without --key, and found no broker."""
    from fleetune.edge.protocol.identity.pkcs11 import TokenSigner

    uri = soft_token_key(soft_token)
    in_memory = Application(member.folder, "nano-1", "token").request.key
    in_token = Application(member.folder, "nano-1", "token", uri).request.key
    assert in_token == TokenSigner(uri).public != in_memory


@pytest.mark.parametrize("content", ["", "{}", "null", '{"purpose":1}', "\x00"])
def test_a_damaged_application_is_named(fleet: GuardedFleet, member: Identity, content: str) -> None:
    path = member.folder / APPLICATION
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=f"{path} is damaged") as caught:
        Application(member.folder, "nano-1", key(member))
    assert "delete it" in caught.value.remedy


def test_so_is_one_whose_key_is_none(fleet: GuardedFleet, member: Identity) -> None:
    applied(fleet, member)
    path = member.folder / APPLICATION
    path.write_text(path.read_text().replace('"key":"ed25519:', '"key":"ed25519:QUJD'))
    with pytest.raises(IdentityError, match=f"{path} is damaged") as caught:
        Application(member.folder, "nano-1", key(member))
    assert "QUJD" not in str(caught.value)


def test_one_that_is_too_large_is_not_read(fleet: GuardedFleet, member: Identity) -> None:
    path = member.folder / APPLICATION
    with path.open("wb") as file:
        file.truncate(1 << 40)
    path.chmod(0o600)
    with pytest.raises(FleetuneError, match="is larger than 64 KiB"):
        Application(member.folder, "nano-1", key(member))


def test_a_key_for_tls_stands_in_no_process_list(fleet: GuardedFleet, member: Identity) -> None:
    """It comes from a process of its own, over a pipe."""
    application, _ = applied(fleet, member)
    assert "PRIVATE KEY" not in application.request.csr
    assert application.request.csr.startswith("-----BEGIN CERTIFICATE REQUEST-----")
    assert json.loads((member.folder / APPLICATION).read_text())["tls_key"].startswith("-----BEGIN PRIVATE KEY-----")


# --- rotation of the authority ------------------------------------------------------------------------------------


def test_a_device_that_was_away_when_a_rotation_began_comes_back_before_it_is_finished(
    fleet: GuardedFleet, broker: GuardedBroker
) -> None:
    """And one that was away all the time has to enrol again, into the same folder."""
    for device in ("nano-1", "nano-2"):
        fleet.enrol(device)
    rotate(fleet, broker)
    assert fleet.identity("nano-1").trust.version == 1  # it has not heard of it
    with fleet.desk(), fleet.agent("nano-1") as agent:
        agent.wait_for("takes version 2 of the fleet's trust document")
        topic = fleet.topics.down("nano-1", "renew")
        with fleet.link("authority") as link:
            word = RenewNow(key(fleet.identity("nano-1")))
            link.publish(topic, sign(topic, word, fleet.authority.signer))
            agent.wait_for("has a new credential")
        agent.wait_until(lambda: agent.output.count("connected to") == 2)
        finish(fleet, broker)
        agent.wait_for("takes version 3 of the fleet's trust document")
    with fleet.peer("nano-1"):
        pass
    with pytest.raises(IdentityError, match="certificate that does not count"):
        Link(fleet.address, "nano-2", subscriptions=["t"], seals=fleet.seals("nano-2")).connect()
    fleet.enrol("nano-2")
    with fleet.peer("nano-2"), fleet.agent("nano-1") as agent:
        agent.wait_for("waits for a round")


def rotate(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    fleet.authority.rotate()
    renew_members(fleet, broker)


def finish(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    fleet.authority.finish_rotation(force=True)
    renew_members(fleet, broker)


def renew_members(fleet: GuardedFleet, broker: GuardedBroker) -> None:
    for role in ("aggregator", "authority"):
        fleet.authority.make_member(role, fleet.home(role))  # type: ignore[arg-type]
    write_broker(fleet.authority, fleet.broker_folder)
    fleet.reload(broker)
