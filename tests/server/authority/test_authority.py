"""The authority's folder: made once, changed by one at a time, and never a dead end."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from fleetune.edge.protocol.errors import AuthorityError, ClockError, ConfigError, KeyExposedError, MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.credential import (
    Credential,
    check_current,
    read_credential,
    read_trust,
    sign_trust,
)
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.server.authority.authority import FILE, Authority, Lives, Site
from fleetune.server.authority.ledger import FILE as LEDGER_FILE
from fleetune.server.authority.x509 import make_key
from support.guarded import DAY, GuardedFleet, TestClock

SITE = Site(("broker.local",))


def issued(fleet: GuardedFleet, name: str) -> Credential:
    raw = fleet.authority.issue("device", name, SeedSigner.generate().public, None).credential
    return read_credential(raw, fleet.authority.trust)


def revoked(fleet: GuardedFleet, credential: Credential) -> bool:
    try:
        check_current(credential, fleet.authority.trust, fleet.clock())
    except MessageError as error:
        return error.reason == "revoked"
    return False


# --- making one ---------------------------------------------------------------------------------------------------


def test_everything_with_a_key_is_its_owners_alone(fleet: GuardedFleet) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in fleet.authority_folder.rglob("*") if path.is_file()}
    secret = [path for path in modes if b"PRIVATE KEY" in path.read_bytes() or path.suffix in (".json", ".sqlite3")]
    assert {path.name for path in secret} == {FILE, LEDGER_FILE, "identity.json", "tls.pem", "broker.key"}
    assert {path: modes[path] for path in secret} == dict.fromkeys(secret, 0o600)
    assert stat.S_IMODE(fleet.authority_folder.stat().st_mode) == 0o700


def test_a_second_one_in_the_same_folder_is_refused(fleet: GuardedFleet) -> None:
    before = (fleet.authority_folder / FILE).read_bytes()
    with pytest.raises(AuthorityError, match="holds an authority already") as caught:
        Authority.make(fleet.authority_folder, "lab", SITE)
    assert caught.value.exit_code == 23
    assert (fleet.authority_folder / FILE).read_bytes() == before


def test_a_clock_that_was_never_set_makes_none(tmp_path: Path) -> None:
    """All that it issued would have expired on every other machine."""
    with pytest.raises(ClockError, match="shows 1970-01-01 00:00") as caught:
        Authority.make(tmp_path / "a", "lab", SITE, clock=lambda: 0.0)
    assert caught.value.exit_code == 27
    assert "timedatectl" in caught.value.remedy
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("fleet_name", "site", "words"), [
    ("a/b", SITE, "fleet: 'a/b'"),
    ("lab", Site(("",)), "host: ''"),
    ("lab", Site(("broker.local", "brök")), "host: 'brök'"),
    ("lab", Site(("a b",)), "host: 'a b'"),
    ("lab", Site(("mqtts://broker",)), "host: 'mqtts://broker'"),
    ("lab", Site(("broker:8883",)), "host: 'broker:8883'"),
    ("lab", Site(("x" * 254,)), "host: 'xxx"),
    ("lab", Site(("broker",), 8883, 8883), "port: 8883"),
])  # fmt: skip
def test_what_no_device_could_reach_is_refused_before_anything_is_written(
    tmp_path: Path, fleet_name: str, site: Site, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Authority.make(tmp_path / "a", fleet_name, site)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("host", ["broker", "broker.local", "10.0.0.2", "fd00::2", "b-1.x", "1"])
def test_names_and_addresses_are_fine(tmp_path: Path, host: str) -> None:
    authority = Authority.make(tmp_path / "a", "lab", Site((host,)))
    assert authority.certify_broker()
    assert host in authority.site.broker
    authority.close()


# --- opening it ---------------------------------------------------------------------------------------------------


def test_no_authority_is_said_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(AuthorityError, match=f"{FILE} is missing") as caught:
        Authority(tmp_path)
    assert caught.value.exit_code == 23
    assert "fleetune fleet init" in caught.value.remedy


@pytest.mark.parametrize("file", [FILE, LEDGER_FILE])
def test_keys_that_others_may_read_are_refused(fleet: GuardedFleet, file: str) -> None:
    (fleet.authority_folder / file).chmod(0o640)
    with pytest.raises(KeyExposedError, match=file) as caught:
        Authority(fleet.authority_folder)
    assert caught.value.exit_code == 25


@pytest.mark.parametrize("content", ["", "{", "null", '{"schema":1}', "\x00", "[" * 100_000])
def test_a_damaged_one_is_named(fleet: GuardedFleet, content: str) -> None:
    (fleet.authority_folder / FILE).write_text(content)
    with pytest.raises(AuthorityError, match=f"{FILE} is damaged") as caught:
        Authority(fleet.authority_folder)
    assert "backup" in caught.value.remedy


def test_no_more_is_read_than_an_authority_has(fleet: GuardedFleet) -> None:
    with (fleet.authority_folder / FILE).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(AuthorityError, match="is larger than 256 KiB"):
        Authority(fleet.authority_folder)


def test_a_newer_schema_is_said_as_such(fleet: GuardedFleet) -> None:
    path = fleet.authority_folder / FILE
    path.write_text(path.read_text().replace('"schema":1', '"schema":2'))
    with pytest.raises(AuthorityError, match="schema 2"):
        Authority(fleet.authority_folder)


def test_a_clock_before_what_was_signed_last_is_refused(fleet: GuardedFleet) -> None:
    """What it signed would be older than what it revoked."""
    now = time.time()
    Authority(fleet.authority_folder, clock=lambda: now - MAX_SKEW + 60).close()
    with pytest.raises(ClockError, match="has passed for sure") as caught:
        Authority(fleet.authority_folder, clock=lambda: now - MAX_SKEW - 60)
    assert caught.value.exit_code == 27


def test_it_does_not_show_its_keys(fleet: GuardedFleet) -> None:
    keys = json.loads((fleet.authority_folder / FILE).read_text())
    secrets = [key.removeprefix("ed25519:") for key in keys["keys"]] + [
        root["key"].splitlines()[1] for root in keys["roots"]
    ]
    shown = f"{fleet.authority!r} {vars(fleet.authority)} {fleet.authority.site}"
    assert len(secrets) == 2
    assert not [secret for secret in secrets if secret in shown]


# --- what it issues -----------------------------------------------------------------------------------------------


def test_what_members_get_counts_for_their_time(tmp_path: Path) -> None:
    clock = TestClock()
    fleet = GuardedFleet(tmp_path / "x", days=7.0, member_days=100.0, clock=clock)
    device, aggregator = fleet.enrol("nano-1").credential, fleet.identity("aggregator").credential
    assert device.expires - device.begins == 7 * DAY
    assert aggregator.expires - aggregator.begins == 100 * DAY
    for name, credential in (("nano-1", device), ("aggregator", aggregator)):
        pem = (fleet.home(name) / "tls.pem").read_bytes()
        assert x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp() == int(credential.expires)
    fleet.close()


@pytest.mark.parametrize("name", ["aggregator", "authority", "broker", "publisher", "a/b", "", "-x", "d" * 65])
def test_no_device_has_a_members_name_or_one_that_does_not_fit_a_topic(fleet: GuardedFleet, name: str) -> None:
    with pytest.raises(ConfigError, match="device: "):
        fleet.authority.make_token(name, 1)
    with pytest.raises(ConfigError, match="device: "):
        fleet.authority.issue("device", name, SeedSigner.generate().public, None)
    assert fleet.authority.ledger.tokens() == []


def test_every_credential_is_in_the_ledger_with_its_certificates_number(fleet: GuardedFleet) -> None:
    identity = fleet.enrol("nano-1")
    pem = (fleet.home("nano-1") / "tls.pem").read_bytes()
    row = next(row for row in fleet.authority.ledger.members() if row.name == "nano-1")
    assert int(row.serial, 16) == x509.load_pem_x509_certificate(pem).serial_number
    assert (row.key, row.authority) == (key_id(identity.credential.key), key_id(fleet.authority.signer.public))


# --- revocation ---------------------------------------------------------------------------------------------------


def test_whoever_is_revoked_is_out_until_something_new_is_issued(fleet: GuardedFleet) -> None:
    before, other = issued(fleet, "nano-1"), issued(fleet, "nano-2")
    assert fleet.authority.revoke("nano-1") == 1
    assert fleet.authority.trust.version == 2
    assert revoked(fleet, before)
    assert not revoked(fleet, other)
    again = issued(fleet, "nano-1")  # in the same millisecond
    assert not revoked(fleet, again)
    assert fleet.authority.revoke("nano-1") == 1
    assert revoked(fleet, again)
    assert fleet.authority.trust.version == 3


def test_what_was_issued_by_a_clock_ahead_is_revoked_too(fleet: GuardedFleet) -> None:
    fleet.clock.ahead = MAX_SKEW - 60
    ahead = issued(fleet, "nano-1")
    fleet.authority.revoke("nano-1")
    fleet.clock.ahead = 0.0
    assert revoked(fleet, ahead)
    assert not revoked(fleet, issued(fleet, "nano-1"))


@pytest.mark.parametrize("name", ["broker", "authority"])
def test_nobody_believes_that_a_broker_was_revoked(fleet: GuardedFleet, name: str) -> None:
    """Devices look at no list of revocations, so its key would go on to count."""
    with pytest.raises(ConfigError, match=f"{name}: devices do not ask") as caught:
        fleet.authority.revoke(name)
    assert "fleetune fleet rotate authority" in caught.value.remedy
    assert fleet.authority.trust.version == 1


_REVOKE = """
import sys, time
from pathlib import Path
from fleetune.server.authority.authority import Authority
authority = Authority(Path(sys.argv[1]), clock=lambda: time.sleep(0.1) or time.time())  # it takes its time
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    authority.revoke(name)
"""


def test_of_processes_that_revoke_at_once_none_undoes_what_another_did(fleet: GuardedFleet) -> None:
    names = [[f"{process}-{i}" for i in range(2)] for process in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _REVOKE, str(fleet.authority_folder), *some],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for some in names
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    fleet.authority.reload()
    assert set(fleet.authority.trust.revoked) == {name for some in names for name in some}
    assert fleet.authority.trust.version == 5


def test_a_revocation_is_remembered_as_long_as_what_it_is_about_could_count(tmp_path: Path) -> None:
    fleet = GuardedFleet(tmp_path / "x", days=10.0, member_days=100.0)
    for name in ("nano-1", "aggregator"):
        fleet.authority.revoke(name)
    kept = {}
    for days in (10.0, 10.1, 100.0, 100.1):
        fleet.clock.ahead = days * DAY
        fleet.authority.revoke("somebody-else")
        kept[days] = set(fleet.authority.trust.revoked) - {"somebody-else"}
    both, aggregator = {"nano-1", "aggregator"}, {"aggregator"}
    assert kept == {10.0: both, 10.1: aggregator, 100.0: aggregator, 100.1: set()}
    fleet.close()


def crowd(fleet: GuardedFleet) -> Callable[[int], None]:
    """Puts so many revoked devices into the trust document."""

    def put(count: int) -> None:
        path = fleet.authority_folder / FILE
        names = {f"device-{i:05}": time.time() for i in range(count)}
        trust = msgspec.structs.replace(fleet.authority.trust, revoked=names)
        document = json.loads(path.read_text())
        document["trust"] = json.loads(sign_trust(trust, fleet.authority.signer))
        path.write_text(json.dumps(document, separators=(",", ":")))
        fleet.authority.reload()

    return put


def test_more_than_fit_a_message_are_not_revoked_by_half_and_a_rotation_makes_room(fleet: GuardedFleet) -> None:
    last = "x" * 64
    fleet.enrol(last)
    crowd(fleet)(1780)
    while True:  # up to the limit
        try:
            fleet.authority.revoke(f"more-{len(fleet.authority.trust.revoked)}")
        except MessageError as error:
            assert "replace the authority's key" in error.remedy
            break
    version = fleet.authority.trust.version
    with pytest.raises(MessageError):
        fleet.authority.revoke(last)
    assert fleet.authority.trust.version == version
    assert [row.revoked for row in fleet.authority.ledger.members() if row.name == last] == [None]
    fleet.clock.ahead = 2.0
    fleet.authority.rotate()
    fleet.authority.finish_rotation(force=True)
    assert fleet.authority.trust.revoked == {}
    fleet.authority.revoke(last)
    assert set(fleet.authority.trust.revoked) == {last}


# --- rotation -----------------------------------------------------------------------------------------------------


def test_each_trust_document_is_signed_by_who_was_believed_before(fleet: GuardedFleet) -> None:
    old = fleet.authority.trust.authorities
    fleet.authority.rotate()
    both = read_trust(fleet.authority.trust_envelope, old, "lab")
    assert (both.version, both.authorities[1:], len(both.roots)) == (2, old, 2)
    fleet.authority.revoke("nano-1")  # in between: those who are away have heard of nobody new
    assert read_trust(fleet.authority.trust_envelope, old, "lab").version == 3
    fleet.authority.finish_rotation(force=True)
    new = read_trust(fleet.authority.trust_envelope, both.authorities, "lab")
    assert (new.version, new.authorities, len(new.roots)) == (4, both.authorities[:1], 1)
    with pytest.raises(MessageError):
        read_trust(fleet.authority.trust_envelope, old, "lab")


def test_after_a_rotation_has_begun_the_new_key_issues_and_the_old_root_vouches_for_the_broker(
    fleet: GuardedFleet,
) -> None:
    before = x509.load_pem_x509_certificate(fleet.authority.trust.roots[0].encode())
    old = issued(fleet, "nano-1")
    fleet.authority.rotate()
    raw = fleet.authority.issue("device", "nano-1", SeedSigner.generate().public, None).credential
    new = msgspec.structs.replace(fleet.authority.trust, authorities=fleet.authority.trust.authorities[:1])
    assert read_credential(raw, new).name == "nano-1"
    assert not revoked(fleet, old)
    assert broker_issuer(fleet.authority) == before.subject
    fleet.authority.finish_rotation(force=True)
    assert broker_issuer(fleet.authority) != before.subject


def broker_issuer(authority: Authority) -> x509.Name:
    return x509.load_pem_x509_certificate(authority.certify_broker()[1]).issuer


def test_steps_of_a_rotation_come_in_their_order(fleet: GuardedFleet) -> None:
    with pytest.raises(AuthorityError, match="no rotation has begun") as caught:
        fleet.authority.finish_rotation()
    assert caught.value.exit_code == 23
    fleet.authority.rotate()
    with pytest.raises(AuthorityError, match="has begun already") as caught:
        fleet.authority.rotate()
    assert "--finish" in caught.value.remedy


def test_a_rotation_is_not_finished_while_somebody_would_be_left_behind(fleet: GuardedFleet) -> None:
    for device in ("nano-1", "nano-2", "gone", "expired"):
        fleet.clock.ahead = -40 * DAY if device == "expired" else 0.0
        fleet.enrol(device)
    fleet.clock.ahead = 0.0
    fleet.authority.revoke("gone")
    fleet.authority.rotate()
    with pytest.raises(AuthorityError, match=r"^aggregator, nano-1, nano-2, publisher: what they") as caught:
        fleet.authority.finish_rotation()
    assert "--force" in caught.value.remedy
    for role in ("aggregator", "publisher"):
        fleet.authority.make_member(role, fleet.home(role))  # type: ignore[arg-type]
    fleet.enrol("nano-1")
    with pytest.raises(AuthorityError, match=r"^nano-2: what they have"):
        fleet.authority.finish_rotation()
    assert len(fleet.authority.trust.authorities) == 2
    fleet.enrol("nano-2")
    fleet.authority.finish_rotation()
    assert len(fleet.authority.trust.authorities) == 1


def test_a_rotation_leaves_no_key_of_before_behind(fleet: GuardedFleet) -> None:
    old = fleet.authority.signer.text
    fleet.authority.rotate()
    fleet.authority.finish_rotation(force=True)
    assert old not in (fleet.authority_folder / FILE).read_text()
    reopened = Authority(fleet.authority_folder)
    assert reopened.signer.public == fleet.authority.signer.public
    reopened.close()


def test_whoever_was_revoked_during_a_rotation_stays_revoked(fleet: GuardedFleet) -> None:
    """What it has may be of the new key."""
    fleet.authority.rotate()
    fleet.clock.ahead = 2.0
    new = issued(fleet, "nano-1")
    fleet.authority.revoke("nano-1")
    fleet.authority.finish_rotation(force=True)
    assert revoked(fleet, new)


def test_a_members_new_keys_count_and_the_old_ones_until_they_are_revoked(fleet: GuardedFleet) -> None:
    old = fleet.identity("aggregator").credential
    fleet.authority.make_member("aggregator", fleet.home("aggregator"))
    new = read_identity(fleet.home("aggregator")).credential
    assert new.key != old.key
    assert not revoked(fleet, old)
    fleet.authority.revoke("aggregator")
    fleet.authority.make_member("aggregator", fleet.home("aggregator"))
    assert revoked(fleet, old)
    assert revoked(fleet, new)
    assert not revoked(fleet, fleet.identity("aggregator").credential)


def test_lives_come_from_the_folder(tmp_path: Path) -> None:
    Authority.make(tmp_path / "a", "lab", SITE, lives=Lives(device=3.0)).close()
    authority = Authority(tmp_path / "a")
    raw = authority.issue("device", "nano-1", SeedSigner.generate().public, make_key().public_key()).credential
    credential = read_credential(raw, authority.trust)
    assert credential.expires - credential.begins == 3 * DAY
    authority.close()


# --- who renews nothing by themselves -----------------------------------------------------------------------------


def test_in_its_last_month_whoever_does_not_renew_is_named(fleet: GuardedFleet) -> None:
    fleet.enrol("nano-1")
    assert fleet.authority.expiring() == []
    fleet.clock.ahead = 336 * DAY  # of 365; devices renew after 20 of 30, and expired long ago
    assert {row.name for row in fleet.authority.expiring()} == {"aggregator", "authority", "publisher", "broker"}
    fleet.authority.make_member("aggregator", fleet.authority_folder / "aggregator")
    assert {row.name for row in fleet.authority.expiring()} == {"authority", "publisher", "broker"}
    fleet.authority.revoke("publisher")
    assert {row.name for row in fleet.authority.expiring()} == {"authority", "broker"}
