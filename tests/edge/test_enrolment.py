"""A device with a token comes into its fleet, over a real broker, and nobody comes in with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.agent import enrolment as module
from fleetune.edge.agent.application import Application
from fleetune.edge.agent.enrolment import enrol
from fleetune.edge.protocol.errors import (
    BrokerUnreachableError,
    EnrolmentError,
    FleetuneError,
    IdentityError,
    KeyExposedError,
)
from fleetune.edge.protocol.identity.credential import sign
from fleetune.edge.protocol.identity.enrolment import CredentialReply, Token, authenticate
from fleetune.edge.protocol.identity.folder import FILE, TLS_FILE, read_identity
from fleetune.server.authority import desk
from fleetune.server.authority.admission import Admission
from fleetune.server.broker import free_port
from support.guarded import GuardedFleet, SoftToken, TestClock, guarded_fleet, quick_keys


@pytest.fixture(scope="module")
def clock() -> TestClock:
    return TestClock()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, clock: TestClock) -> Iterator[GuardedFleet]:
    """A fleet whose authority lets devices in."""
    with pytest.MonkeyPatch.context() as patch, guarded_fleet(tmp_path_factory.mktemp("door"), clock=clock) as fleet:
        patch.setattr(desk, "_LOOK_EVERY", 0.1)
        with fleet.broker(), fleet.desk():
            yield fleet


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_ASK_AGAIN", 0.3)
    with quick_keys():
        yield


def refused(token: Token, folder: Path, words: str, code: int = 24, **options: float) -> FleetuneError:
    with pytest.raises(FleetuneError, match=words) as caught:
        enrol(token, folder, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code
    assert not (folder / FILE).exists() or code != 24
    return caught.value


def test_a_device_makes_its_keys_and_is_a_member(door: GuardedFleet) -> None:
    token = door.authority.make_token("comes-in", 1)
    identity = enrol(Token.parse(token.text), door.home("comes-in"))
    credential = identity.credential
    assert (credential.fleet, credential.role, credential.name) == ("lab", "device", "comes-in")
    assert {path.name: path.stat().st_mode & 0o777 for path in door.home("comes-in").iterdir()} == {
        "identity.json": 0o600,
        "tls.pem": 0o600,
        "roots.pem": 0o644,
    }
    for folder in (door.home("comes-in"), door.state("comes-in")):
        assert folder.stat().st_mode & 0o777 == 0o700
    with door.peer("comes-in") as peer:
        peer.publish(door.topics.presence("comes-in"))


def test_a_token_lets_one_device_in(door: GuardedFleet, tmp_path: Path) -> None:
    token = door.authority.make_token("first", 1)
    first = enrol(token, tmp_path / "first")
    error = refused(token, tmp_path / "thief", "the token was used already, for another key")
    assert "find out by whom" in error.remedy
    assert read_identity(tmp_path / "first").credential == first.credential


def test_a_device_whose_reply_was_lost_is_let_in_with_the_same_token(door: GuardedFleet, tmp_path: Path) -> None:
    """It was switched off, or its broker was: its keys are on disk, and the token is for them."""
    token = door.authority.make_token("lost-reply", 1)
    application = Application(tmp_path / "x", token.device, token.id)
    Admission(door.authority).enrol(token.id, authenticate(application.request, token, "request"))
    assert enrol(token, tmp_path / "x").credential.key == application.request.key


def test_a_token_that_has_expired(door: GuardedFleet, clock: TestClock, tmp_path: Path) -> None:
    clock.ahead = -7200.0
    token = door.authority.make_token("late", 1)
    clock.ahead = 0.0
    error = refused(token, tmp_path / "x", "the token has expired")
    assert "fleetune fleet enroll" in error.remedy


def test_a_token_of_another_device(door: GuardedFleet, tmp_path: Path) -> None:
    """Whoever has a token cannot come in under another name with it."""
    token = door.authority.make_token("its-own", 1)
    for name in ("another", "aggregator"):
        error = refused(msgspec.structs.replace(token, device=name), tmp_path / name, "the token is for another device")
        assert "use the token of this device" in error.remedy


@pytest.mark.parametrize("change", [{"secret": bytes(32)}, {"id": "ab" * 16}])
def test_a_token_that_nobody_handed_out(door: GuardedFleet, tmp_path: Path, change: dict[str, object]) -> None:
    token = msgspec.structs.replace(door.authority.make_token("guess", 1), **change)
    error = refused(token, tmp_path / "x", "nobody answers at mqtts://localhost:[0-9]+ within 0.5 s", timeout=0.5)
    assert "with the authority that has made the token" in error.remedy


def test_a_newer_token_makes_the_one_before_worthless_used_or_not(door: GuardedFleet, tmp_path: Path) -> None:
    for used in (False, True):
        token = door.authority.make_token("newer", 1)
        folder = tmp_path / f"{used}"
        if used:
            enrol(token, folder)
            Application(folder, token.device, token.id)  # it would ask again
        door.authority.make_token("newer", 1)
        with pytest.raises(EnrolmentError, match="nobody answers"):
            enrol(token, folder, timeout=0.5)


@pytest.mark.parametrize("forged", ["guessed", "nonsense", "own"])
def test_a_reply_of_somebody_who_does_not_know_the_secret_is_passed_over(
    door: GuardedFleet, tmp_path: Path, forged: str
) -> None:
    """The broker, say, which is first: it can neither refuse a device nor let it into another fleet."""
    token = door.authority.make_token(f"patient-{forged}", 1)
    refusal = CredentialReply("used-token")
    raw = {
        "guessed": authenticate(refusal, msgspec.structs.replace(token, secret=bytes(32)), "reply"),
        "nonsense": b"nonsense",
        "own": sign(door.topics.enrolment(token.id, "reply"), refusal, door.authority.signer),
    }[forged]
    with door.peer("authority") as peer:
        peer.publish(door.topics.enrolment(token.id, "reply"), raw, retain=True)
    assert enrol(token, tmp_path / "x").credential.name == token.device


def test_nobody_serves(fleet: GuardedFleet, tmp_path: Path) -> None:
    token = fleet.authority.make_token("nano-1", 1)
    with fleet.broker():
        error = refused(token, tmp_path / "x", "nobody answers", timeout=0.5)
    assert "fleetune fleet serve" in error.remedy


def test_no_broker_is_there(door: GuardedFleet, tmp_path: Path) -> None:
    token = msgspec.structs.replace(door.authority.make_token("nano-1", 1), broker=f"mqtts://localhost:{free_port()}")
    with pytest.raises(BrokerUnreachableError):
        enrol(token, tmp_path / "x")


def test_the_port_for_members_asks_for_a_certificate(door: GuardedFleet, tmp_path: Path) -> None:
    token = msgspec.structs.replace(door.authority.make_token("nano-1", 1), broker=str(door.address))
    refused(token, tmp_path / "x", "it wants a certificate", 26)


def test_a_key_in_a_hardware_token_is_made_there(door: GuardedFleet, soft_token: SoftToken, tmp_path: Path) -> None:
    uri = soft_token.uri("enrolled")
    identity = enrol(door.authority.make_token("with-tpm", 1), tmp_path / "x", key=uri)
    assert json.loads((tmp_path / "x" / FILE).read_text())["key"] == uri
    assert identity.credential.key == identity.signer.public


# --- what is in the folder already --------------------------------------------------------------------------------


def test_another_devices_folder_is_left_alone(door: GuardedFleet, tmp_path: Path) -> None:
    enrol(door.authority.make_token("was-first", 1), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    error = refused(door.authority.make_token("second", 1), tmp_path / "x", "the identity of device was-first", 26)
    assert "name another folder for second of lab" in error.remedy
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_so_is_one_of_another_fleet(door: GuardedFleet, tmp_path: Path) -> None:
    with guarded_fleet(tmp_path / "plant", "nano-1", name="plant") as plant:
        folder = plant.home("nano-1")
        refused(door.authority.make_token("nano-1", 1), folder, "of the fleet plant", 26)


def test_a_device_that_enrols_again_has_new_keys(door: GuardedFleet, tmp_path: Path) -> None:
    first, second = (enrol(door.authority.make_token("again", 1), tmp_path / "x") for _ in range(2))
    assert first.credential.key != second.credential.key
    assert read_identity(tmp_path / "x").credential == second.credential


@pytest.mark.parametrize("damage", ["{", '{"schema":1}', ""])
def test_a_damaged_identity_is_replaced(door: GuardedFleet, tmp_path: Path, damage: str) -> None:
    """Whoever finds it damaged is told to enrol again."""
    enrol(door.authority.make_token("damaged", 1), tmp_path / "x")
    (tmp_path / "x" / FILE).write_text(damage)
    with pytest.raises(IdentityError) as caught:
        read_identity(tmp_path / "x")
    assert "enrol this machine again" in caught.value.remedy
    assert enrol(door.authority.make_token("damaged", 1), tmp_path / "x").credential.name == "damaged"


def test_so_is_one_that_a_rotation_has_left_behind(door: GuardedFleet, tmp_path: Path) -> None:
    with guarded_fleet(tmp_path / "other", "left-behind", name="lab") as other:  # of an authority that is no more
        folder = other.home("left-behind")
        identity = other.identity("left-behind")
        document = json.loads((folder / FILE).read_text())
        document["trust"] = json.loads(door.authority.trust_envelope)
        (folder / FILE).write_text(json.dumps(document, separators=(",", ":")))
        with pytest.raises(IdentityError, match="no authority of the fleet signed"):
            read_identity(folder)
        renewed = enrol(door.authority.make_token("left-behind", 1), folder)
        assert renewed.credential.key != identity.credential.key
        assert read_identity(folder).trust.authorities == door.authority.trust.authorities


def test_a_key_that_others_may_read_is_mended_first(door: GuardedFleet, tmp_path: Path) -> None:
    enrol(door.authority.make_token("exposed", 1), tmp_path / "x")
    (tmp_path / "x" / TLS_FILE).chmod(0o644)
    with pytest.raises(KeyExposedError):
        enrol(door.authority.make_token("exposed", 1), tmp_path / "x")
