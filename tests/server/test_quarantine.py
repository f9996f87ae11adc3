"""Who sends nothing but bad updates is kept out, over restarts too, until the operator lets it in again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.edge.protocol.messages import Presence
from fleetune.server.journal import FILE, Journal, Quarantined, Readmitted, Record, Refused, read_records
from fleetune.server.quarantine import FOR_CAUSE, Quarantine
from fleetune.server.registry import Registry
from fleetune.server.store import open_store
from support.smalldisk import fill, small_disk


class Bench:
    """A journal, what follows from it, and the fleet of the devices ``a`` and ``b``."""

    def __init__(self, folder: Path, after: int = 3) -> None:
        self.journal = Journal(folder)
        self.store = open_store(self.journal)
        self.registry = Registry(frozenset({"a", "b"}))
        for name in "ab":
            self.registry.update(Presence(name=name, state="idle", boot=1, kit="1"))
        self.quarantine = Quarantine(self.journal, self.store, self.registry, after)

    _numbers = itertools.count()

    def strike(self, device: str, *reasons: str) -> list[bool]:
        return [self.quarantine.strike(device, f"u-{next(self._numbers)}", reason) for reason in reasons]

    def restart(self, after: int = 3) -> Bench:
        self.close()
        return Bench(self.journal.folder, after)

    def close(self) -> None:
        self.store.close()
        self.journal.close()

    def records(self) -> list[Record]:
        return list(read_records(self.journal.folder / FILE))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "run")
    yield bench
    bench.close()


def test_the_third_refusal_for_cause_is_one_too_many(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert bench.strike("a", "not-finite", "wrong-shape") == [False, False]
    assert bench.registry.members() == {"a", "b"}
    assert bench.strike("a", "not-finite") == [True]
    assert bench.quarantine.holds("a")
    assert not bench.quarantine.holds("b")
    assert bench.registry.members() == bench.registry.ready() == {"b"}
    assert bench.registry.losses() == {"a": "quarantined: not-finite"}
    (said,) = [record.message for record in caplog.records if "quarantine" in record.message]
    assert "a is quarantined: 3 of its updates were refused, the last one as not-finite" in said
    assert "--readmit a" in said


@pytest.mark.parametrize("reason", ["stale-round", "no-room", "damaged", "wrong-chunk", "wrong-hash", "wrong-run"])
def test_what_happens_to_good_devices_does_not_count(reason: str, bench: Bench) -> None:
    assert bench.strike("a", *[reason] * 9) == [False] * 9
    assert bench.records() == []


@pytest.mark.parametrize("reason", sorted(FOR_CAUSE))
def test_every_cause_counts_alike(reason: str, bench: Bench) -> None:
    assert bench.strike("a", reason, reason, reason) == [False, False, True]


def test_who_is_kept_out_is_counted_no_further_and_the_journal_does_not_grow(bench: Bench) -> None:
    bench.strike("a", *["not-finite"] * 3)
    assert bench.strike("a", *["not-finite"] * 9) == [False] * 9
    assert [type(record) for record in bench.records()] == [Refused, Refused, Refused, Quarantined]


def test_one_update_that_comes_again_and_again_counts_once(bench: Bench) -> None:
    assert not any(bench.quarantine.strike("a", "the same", "not-finite") for _ in range(9))
    assert not bench.quarantine.holds("a")


def test_it_can_be_another_number(tmp_path: Path) -> None:
    bench = Bench(tmp_path, after=1)
    assert bench.strike("a", "malformed") == [True]
    bench.close()


@pytest.mark.parametrize("index_is_lost", [False, True])
def test_a_restart_keeps_both_the_quarantine_and_the_count(bench: Bench, index_is_lost: bool) -> None:
    bench.strike("a", *["not-finite"] * 3)
    bench.strike("b", "malformed", "malformed")
    if index_is_lost:
        bench.store.close()
        for file in bench.journal.folder.glob("aggregator.sqlite*"):
            file.unlink()
    again = bench.restart()
    assert again.quarantine.holds("a")
    assert again.registry.members() == {"b"}
    assert {row.id: row.quarantined for row in again.store.devices()} == {"a": "not-finite"}
    assert again.strike("b", "malformed") == [True]
    again.close()


def test_whoever_is_let_in_again_begins_anew(bench: Bench) -> None:
    bench.strike("a", *["not-finite"] * 3)
    bench.quarantine.readmit("a")
    assert not bench.quarantine.holds("a")
    assert bench.registry.members() == {"a", "b"}
    assert isinstance(bench.records()[-1], Readmitted)
    again = bench.restart()
    assert again.registry.members() == {"a", "b"}
    assert again.strike("a", "not-finite", "not-finite") == [False, False]
    again.quarantine.readmit("b")  # who was never kept out
    assert isinstance(again.records()[-1], Refused)
    again.close()


def test_without_room_for_a_record_a_device_is_kept_out_all_the_same(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk:
        bench = Bench(disk / "run")
        ballast = fill(disk, leave=0)
        assert bench.strike("a", *["not-finite"] * 3) == [False, False, True]
        assert bench.registry.members() == {"b"}
        ballast.unlink()
        bench.close()
