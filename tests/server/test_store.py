"""The store: what one asks about devices, rounds and updates; and that the journal is the truth."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.protocol.messages import Announcement, Presence, UpdateManifest
from fleetune.server.journal import Accepted, Announced, Closed, Finished, Journal, Record, Typical
from fleetune.server.store import FILE, DeviceRow, RoundRow, Store, open_store

ANNOUNCEMENT = Announcement(
    fleet="lab", run="r", job="fedms", version=0, method="fedms", stage="global", round=1, rounds=5, backbone="b",
    quantisation="nf4", settings={"depth": 2, "mix": "logits"}, issued=0.0, expires=1e9,
)  # fmt: skip


def announced(version: int, job: str = "fedms") -> Announced:
    return Announced(msgspec.structs.replace(ANNOUNCEMENT, version=version, job=job))


def accepted(device: str, version: int, into: int | None = None, start: int = 0, job: str = "fedms") -> Accepted:
    manifest = UpdateManifest(
        fleet="lab", device=device, update=f"r-{job}-{version}", run="r", job=job, version=version, issued=0.0,
        backbone="b",
        samples=9, metrics={"loss": 0.5, "stopped_early": False},
    )  # fmt: skip
    into = version if into is None else into
    return Accepted(manifest, 12.5, into=into, staleness=into - version, start=start)


RECORDS: list[Record] = [
    announced(0), accepted("a", 0), accepted("b", 0, start=10), Closed("fedms", 0, ["a", "b"], 13.5, 0, {"loss": 0.5}),
    announced(1), accepted("a", 1), accepted("c", 0, into=1, start=20),
]  # fmt: skip


def presence(name: str, **changes: object) -> Presence:
    return msgspec.structs.replace(Presence(name=name, state="online", boot=1, kit="1", detail="starts"), **changes)


def devices(store: Store) -> dict[str, tuple[int, int, int]]:
    """Device → updates accepted in time, late, refused."""
    return {row.id: (row.accepted, row.late, row.refused) for row in store.devices()}


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / FILE if request.param == "file" else ":memory:")
    yield store
    store.close()


class TestEveryStore:
    """What holds wherever it is kept."""

    def test_a_new_one_is_empty(self, store: Store) -> None:
        assert store.read == 0
        assert store.devices() == []
        assert store.rounds("fedms") == []
        assert list(store.accepted("fedms", 0)) == []
        assert not store.is_finished("fedms")
        assert not store.has_update("a", "r-fedms-0")

    def test_it_knows_how_far_it_has_read(self, store: Store) -> None:
        store.add(RECORDS[:2], 100)
        assert store.read == 100
        store.add([], 120)
        assert store.read == 120

    def test_rounds_come_back_in_order_and_by_job(self, store: Store) -> None:
        store.add([announced(10), announced(9), announced(3, "other")], 1)
        assert [row.announcement.version for row in store.rounds("fedms")] == [9, 10]
        assert store.rounds("other") == [RoundRow(announced(3, "other").announcement, None, 0, 0, {})]

    def test_a_round_is_open_until_it_is_closed(self, store: Store) -> None:
        store.add(RECORDS, 1)
        first, second = store.rounds("fedms")
        assert first == RoundRow(announced(0).announcement, 13.5, 2, 0, {"loss": 0.5})
        assert (second.closed, second.answers, second.means) == (None, 0, {})
        assert (first.typical, second.typical) == (None, None)
        store.add([Closed("fedms", 1, ["a"], 15.5, late=1, typical=Typical(0.1, 9))], 2)
        second = store.rounds("fedms")[1]
        assert (second.closed, second.answers, second.late, second.means) == (15.5, 1, 1, {})
        assert second.typical == Typical(0.1, 9)

    def test_updates_come_back_whole_in_the_order_in_which_they_were_accepted(self, store: Store) -> None:
        shuffled = [accepted("a", 0, start=20), accepted("b", 0, start=9), accepted("c", 0, start=100)]
        store.add([announced(0), *shuffled], 1)
        assert list(store.accepted("fedms", 0)) == [shuffled[1], shuffled[0], shuffled[2]]
        assert list(store.accepted("other", 0)) == []

    def test_a_late_update_belongs_to_the_round_that_took_it_in(self, store: Store) -> None:
        store.add(RECORDS, 1)
        assert [record.manifest.device for record in store.accepted("fedms", 0)] == ["a", "b"]
        assert list(store.accepted("fedms", 1)) == RECORDS[5:7]

    def test_of_what_is_forgotten_it_knows_that_it_was_accepted(self, store: Store) -> None:
        store.add(RECORDS, 1)
        store.forget("other", 9)
        store.forget("fedms", 0)
        assert list(store.accepted("fedms", 0)) == []
        assert list(store.accepted("fedms", 1)) == RECORDS[5:7]
        assert store.has_update("b", "r-fedms-0")
        assert devices(store)["b"] == (1, 0, 0)

    def test_an_update_counts_once(self, store: Store) -> None:
        for read in (1, 2):
            store.add([announced(0), announced(1), accepted("a", 0), accepted("b", 0, into=1)], read)
        assert devices(store) == {"a": (1, 0, 0), "b": (0, 1, 0)}
        assert len(list(store.accepted("fedms", 0))) == 1
        assert store.has_update("a", "r-fedms-0")
        assert not store.has_update("a", "r-fedms-1")
        assert not store.has_update("c", "r-fedms-0")

    def test_a_job_is_finished_when_the_journal_says_so(self, store: Store) -> None:
        store.add([Finished("fedms"), Finished("fedms")], 1)
        assert store.is_finished("fedms")
        assert not store.is_finished("other")

    def test_the_newest_presence_of_a_device_counts_and_the_first_sight_stays(self, store: Store) -> None:
        store.see([presence("b"), presence("a")], now=10.0)
        store.see([presence("a", state="working", boot=2, kit="2", detail="trains")], now=20.0)
        first, second = store.devices()
        assert first == DeviceRow("a", "working", "trains", 2, "2", 10.0, 20.0, 0, 0, 0, "", "")
        assert (second.id, second.first_seen, second.last_seen) == ("b", 10.0, 10.0)

    def test_a_device_whose_updates_came_first_is_seen_later(self, store: Store) -> None:
        store.add([announced(0), accepted("a", 0)], 1)
        assert store.devices() == [DeviceRow("a", "", "", None, "", None, None, 1, 0, 0, "", "")]
        store.see([presence("a")], now=10.0)
        assert store.devices() == [DeviceRow("a", "online", "starts", 1, "1", 10.0, 10.0, 1, 0, 0, "", "")]

    def test_refusals_are_counted_with_the_last_reason(self, store: Store) -> None:
        for reason in ("no-samples", "stale-round"):
            store.refuse("a", reason)
        (row,) = store.devices()
        assert (row.id, row.refused, row.reason, row.accepted) == ("a", 2, "stale-round", 0)

    def test_records_are_taken_all_or_none(self, store: Store) -> None:
        def torn() -> Iterator[Record]:
            yield announced(0)
            yield accepted("a", 0)
            raise OSError(5, "Input/output error")

        with pytest.raises(OSError, match="Input/output"):
            store.add(torn(), 100)
        assert (store.read, store.rounds("fedms"), store.devices()) == (0, [], [])
        store.add([announced(0)], 50)
        assert store.read == 50


# --- beside the journal -----------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "run")
    yield journal
    journal.close()


def contents(store: Store) -> tuple[object, ...]:
    return (
        store.read,
        store.rounds("fedms"),
        devices(store),
        list(store.accepted("fedms", 1)),
        store.has_update("b", "r-fedms-0"),
    )


def opened(journal: Journal) -> tuple[object, ...]:
    """What it holds after a restart."""
    store = open_store(journal)
    found = contents(store)
    store.close()
    return found


def written(journal: Journal) -> tuple[object, ...]:
    """Fill the journal and its store; returns what it holds."""
    journal.append(*RECORDS)
    found = opened(journal)
    assert found[0] == journal.size
    assert found[2] == {"a": (2, 0, 0), "b": (1, 0, 0), "c": (0, 1, 0)}
    return found


def lose(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def age(path: Path) -> None:
    """Of a version with other tables."""
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE journal (seen INTEGER)")
    database.execute("INSERT INTO journal VALUES (7)")
    database.commit()
    database.close()


def age_a_little(path: Path) -> None:
    """Of a version that did not know what is typical of a round."""
    change(path, "ALTER TABLE rounds RENAME COLUMN typical TO something_else")


def mistype(path: Path) -> None:
    """SQLite takes any type in any column."""
    change(path, "UPDATE journal SET read = 'far'")


def misquote(path: Path) -> None:
    """What SQLite quotes of its schema is no UTF-8."""
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE devices", b"CREATE TABLE \xff\xfeevices"))


def oversize(path: Path) -> None:
    """A row of the schema claims 2⁴⁹ bytes."""
    raw = path.read_bytes()
    row = raw.index(b"tablequarantinequarantine") - 10  # with its size, its number, and the types of its columns
    path.write_bytes(raw[:row] + b"\xff" * 6 + b"\x7f" + raw[row + 7 :])


def change(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


@pytest.mark.parametrize("damage", [lose, empty, garble, shorten, age, age_a_little, mistype, misquote, oversize])
def test_a_file_that_is_lost_or_damaged_is_made_anew_from_the_journal(
    damage: Callable[[Path], None], journal: Journal
) -> None:
    before = written(journal)
    for leftover in journal.folder.glob(f"{FILE}-*"):
        leftover.unlink()
    damage(journal.folder / FILE)
    assert opened(journal) == before


def test_a_row_that_claims_more_than_all_memory_is_damage_to_whoever_only_looks(journal: Journal) -> None:
    written(journal)
    oversize(journal.folder / FILE)
    store = Store(journal.folder / FILE, only_look=True)
    with pytest.raises(sqlite3.DatabaseError, match="more memory than there may be"):
        store.devices()
    store.close()


def test_a_file_that_is_ahead_of_the_journal_is_made_anew(journal: Journal) -> None:
    before = written(journal)
    store = open_store(journal)
    store.add([announced(2), accepted("z", 1)], journal.size + 500)  # of what a power cut took from the journal
    store.close()
    assert opened(journal) == before


def test_after_a_restart_only_the_tail_is_read(journal: Journal) -> None:
    written(journal)
    raw = journal.path.read_bytes()
    journal.path.write_bytes(raw.replace(b'"device":"b"', b'"device":"x"'))  # nobody looks there any more
    journal.append(accepted("d", 1, start=30))
    found = opened(journal)
    assert found[0] == journal.size
    assert found[2] == {"a": (2, 0, 0), "b": (1, 0, 0), "c": (0, 1, 0), "d": (1, 0, 0)}


def test_what_was_read_already_is_not_counted_again(journal: Journal) -> None:
    before = written(journal)
    for _ in range(3):
        assert opened(journal) == before


def test_what_only_the_file_knows_outlasts_a_restart(journal: Journal) -> None:
    written(journal)
    store = open_store(journal)
    store.see([presence("a")], now=10.0)
    store.refuse("a", "no-samples")
    store.close()
    store = open_store(journal)
    row = store.devices()[0]
    assert (row.id, row.state, row.first_seen, row.refused, row.reason) == ("a", "online", 10.0, 1, "no-samples")
    store.close()


@pytest.mark.parametrize("statement", [
    "UPDATE devices SET boot = 'often'",
    "UPDATE devices SET last_seen = 1e300",
    "UPDATE devices SET accepted = x'00'",
    "UPDATE rounds SET announcement = '{'",
    "UPDATE rounds SET closed = -5.0",
    "UPDATE rounds SET means = x'ff'",
    "UPDATE updates SET record = '[]'",
])  # fmt: skip
def test_a_row_that_is_damaged_is_an_error_of_the_database(statement: str, journal: Journal) -> None:
    written(journal)
    change(journal.folder / FILE, statement)
    store = open_store(journal)
    with pytest.raises(sqlite3.DatabaseError, match="a row is damaged"):
        contents(store), store.devices()
    store.close()
