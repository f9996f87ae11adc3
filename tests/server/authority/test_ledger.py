"""The ledger: each token once, whoever asks at the same time, and everybody who was ever let in."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import AuthorityError, KeyExposedError
from fleetune.edge.protocol.identity.enrolment import Token
from fleetune.server.authority.ledger import Ledger, MemberRow

NOW = 1_800_000_000.0
DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger(path)


def token(device: str = "nano-1") -> Token:
    return Token.make("lab", device, broker="mqtts://b", expires=NOW)


def member(name: str, serial: str, begins: float = NOW, days: float = 30.0) -> MemberRow:
    return MemberRow(serial, "device", name, "k", begins, begins + days * DAY, "a")


def test_a_token_is_used_for_one_key(ledger: Ledger) -> None:
    made = token()
    ledger.add_token(made)
    assert ledger.use_token(made.id, "a", NOW)
    assert not ledger.use_token(made.id, "b", NOW)
    assert ledger.use_token(made.id, "a", NOW + 1)  # its reply was lost
    row, _ = ledger.token(made.id) or pytest.fail("it is gone")
    assert (row.key, row.used) == ("a", NOW)


def test_a_token_that_was_never_handed_out_is_not_used(ledger: Ledger) -> None:
    assert ledger.token("0" * 32) is None
    assert not ledger.use_token("0" * 32, "a", NOW)
    assert ledger.tokens() == []


_USE = """
import sys
from pathlib import Path
from fleetune.server.authority.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(ledger.use_token(sys.argv[2], sys.argv[3], 1.0))
"""


def test_of_processes_that_use_a_token_at_once_one_wins(ledger: Ledger, path: Path) -> None:
    made = [token(f"nano-{i}") for i in range(6)]
    for one in made:
        ledger.add_token(one)
    winners = []
    for one in made[:2]:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _USE, str(path), one.id, key],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for key in "abc"
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate()[0].strip() for process in processes]
        assert sorted(said) == ["False", "False", "True"]
        row, _ = ledger.token(one.id) or pytest.fail("it is gone")
        winners.append((row.key, "abc"[said.index("True")]))
    assert all(kept == told for kept, told in winners)


def test_a_newer_token_takes_the_place_of_those_before(ledger: Ledger) -> None:
    first, second, other = token(), token(), token("nano-2")
    for made in (first, other):
        ledger.add_token(made)
        ledger.use_token(made.id, "a", NOW)
    ledger.add_token(second)
    assert ledger.token(first.id) is None
    assert {row.id for row in ledger.tokens()} == {second.id, other.id}


def test_a_revoked_device_has_no_token_left_not_even_the_one_it_used(ledger: Ledger) -> None:
    """With it, and the key that it was used for, it would be let in again."""
    waits, used, other = token(), token(), token("nano-2")
    for made in (used, other):
        ledger.add_token(made)
        ledger.use_token(made.id, "a", NOW)
    ledger.revoke("nano-1", NOW)
    assert ledger.token(used.id) is None
    ledger.add_token(waits)
    ledger.revoke("nano-1", NOW)
    assert ledger.token(waits.id) is None
    assert ledger.token(other.id) is not None


def test_members_are_listed_with_the_newest_of_each_last(ledger: Ledger) -> None:
    for row in (member("b", "1", NOW + 5), member("a", "2"), member("b", "3", NOW)):
        ledger.add_member(row)
    assert [row.serial for row in ledger.members()] == ["2", "3", "1"]
    assert ledger.members()[0] == member("a", "2")


def test_all_that_somebody_has_is_revoked_and_keeps_the_time_of_it(ledger: Ledger) -> None:
    for row in (member("a", "1"), member("a", "2"), member("b", "3")):
        ledger.add_member(row)
    assert ledger.revoke("a", NOW + 1) == 2
    ledger.add_member(member("a", "4", NOW + 2))
    assert ledger.revoke("a", NOW + 3) == 1
    assert {row.serial: row.revoked for row in ledger.members()} == {
        "1": NOW + 1,
        "2": NOW + 1,
        "4": NOW + 3,
        "3": None,
    }
    assert ledger.revoke("nobody", NOW) == 0


def test_what_has_long_expired_is_let_go(ledger: Ledger) -> None:
    """A device renews every few weeks, for years."""
    for month in range(36):
        ledger.add_member(member("a", f"{month}", NOW + month * 20 * DAY))
    assert len(ledger.members()) < 6


def test_it_is_all_there_after_a_restart(ledger: Ledger, path: Path) -> None:
    made = token()
    ledger.add_token(made)
    ledger.add_member(member("a", "1"))
    ledger.close()
    again = Ledger(path)
    assert again.members() == [member("a", "1")]
    assert again.token(made.id) is not None


def test_it_is_its_owners_alone(ledger: Ledger, path: Path) -> None:
    """The tokens in it let devices in."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(KeyExposedError, match=str(path)):
        Ledger(path)


def test_a_damaged_one_is_named(path: Path) -> None:
    path.write_bytes(b"nonsense" * 1000)
    path.chmod(0o600)
    with pytest.raises(AuthorityError, match=str(path)) as caught:
        Ledger(path)
    assert "backup" in caught.value.remedy
