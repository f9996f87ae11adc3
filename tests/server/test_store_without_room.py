"""The index of the journal while its disk is full: it lags, and forgets nothing meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.edge.protocol.messages import Presence, UpdateManifest
from fleetune.server.journal import Accepted
from fleetune.server.store import Store


class SmallDisk(Store):
    """A store on a disk whose room can be taken: SQLite says the same of its own limit and of the disk's."""

    def limit(self, pages: int) -> None:
        self._database.execute(f"PRAGMA max_page_count = {pages}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SmallDisk]:
    found = SmallDisk(tmp_path / "store.sqlite")
    yield found
    found.close()


def accepted(number: int) -> Accepted:
    manifest = UpdateManifest(
        fleet="lab",
        device="d",
        update=f"u-{number}",
        run="r",
        job="fedms",
        version=1,
        issued=0.0,
        backbone="b",
        samples=1,
        metrics={f"metric-{n}": "x" * 20 for n in range(100)},  # a record of some pages
    )
    return Accepted(manifest, received=0.0, into=1)


def test_what_has_no_room_is_known_all_the_same_and_written_when_there_is(store: SmallDisk) -> None:
    store.add([accepted(0)], 100)
    store.limit(1)  # what is there already is the least
    for number in range(1, 30):
        store.add([accepted(number)], 100 * (number + 1))
    assert store.read < 3000
    assert all(store.has_update("d", f"u-{number}") for number in range(30))
    assert not store.has_update("d", "u-30")
    store.limit(10_000)
    store.add([accepted(30)], 3100)
    assert store.read == 3100
    assert [row.accepted for row in store.devices()] == [31]
    assert len(list(store.accepted("fedms", 1))) == 31


def test_what_devices_say_waits_for_room_too(store: SmallDisk) -> None:
    store.limit(1)
    for number in range(100):
        store.see([Presence(name=f"d{number}", state="idle", boot=1, kit="1", detail="x" * 200)], 1.0)
        store.refuse(f"e{number}", "no-room")
    known = len(store.devices())
    assert known < 200
    store.limit(10_000)
    store.refuse("new", "no-room")
    store.refuse("new", "stale-round")
    assert len(store.devices()) == known + 1
    assert [(row.refused, row.reason) for row in store.devices() if row.id == "new"] == [(2, "stale-round")]


def test_a_failure_leaves_no_half_of_a_change(store: SmallDisk) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.see([Presence(name="a", state="idle", boot=1, kit="1"), Presence(None, "idle", 1, "1")], 1.0)  # type: ignore[arg-type]
    assert store.devices() == []
    store.refuse("a", "no-room")
    assert [row.id for row in store.devices()] == ["a"]


def test_a_start_without_room_for_what_the_journal_has_is_an_error(store: SmallDisk) -> None:
    store.limit(1)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.catch_up([accepted(number) for number in range(30)], 3000)
    assert store.read == 0
    assert list(store.accepted("fedms", 1)) == []
