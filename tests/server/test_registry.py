"""The registry: who is of the fleet, who is there, who failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.messages import Presence
from fleetune.server.registry import Registry
from fleetune.server.store import Store

FLEET = frozenset({"a", "b", "c"})


def presence(name: str, state: Any = "online", boot: int = 1, detail: str = "") -> Presence:
    return Presence(name=name, state=state, boot=boot, kit="1", detail=detail)


@pytest.fixture
def fleet() -> Registry:
    return Registry(FLEET)


def test_expected_devices_are_members_before_they_are_there(fleet: Registry) -> None:
    assert fleet.members() == FLEET
    assert fleet.ready() == set()


def test_a_device_is_ready_while_it_is_connected(fleet: Registry) -> None:
    for state in ("online", "working", "idle"):
        fleet.update(presence("a", state))
        assert fleet.ready() == {"a"}
    fleet.update(presence("a", "offline"))
    assert fleet.ready() == set()
    assert fleet.members() == FLEET


def test_who_is_revoked_is_no_member_until_it_is_enrolled_again(fleet: Registry) -> None:
    fleet.update(presence("a"))
    fleet.shut_out(frozenset({"a", "nobody"}))
    assert fleet.members() == FLEET - {"a"}
    assert fleet.ready() == set()
    assert fleet.losses() == {"a": "revoked"}
    fleet.update(presence("a", "working", boot=2))
    assert fleet.ready() == set()
    fleet.keep_out("a", "not-finite")
    fleet.shut_out(frozenset())
    assert fleet.losses() == {"a": "quarantined: not-finite"}
    fleet.let_in("a")
    assert fleet.members() == FLEET
    assert fleet.ready() == {"a"}


def test_who_is_revoked_is_shown_so_until_it_speaks_again(fleet: Registry, tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite")
    try:
        fleet.update(presence("a", "working"))
        fleet.update(presence("b", "working"))
        fleet.save(store)
        fleet.shut_out(frozenset({"a"}))
        fleet.update(presence("a", "working", boot=2))  # said before it heard of it
        fleet.save(store)
        assert [row.state for row in store.devices()] == ["revoked", "working"]
        fleet.shut_out(frozenset())
        fleet.update(presence("a", "online", boot=3))
        fleet.save(store)
        assert [row.state for row in store.devices()] == ["online", "working"]
    finally:
        store.close()


def test_the_late_will_of_an_earlier_boot_is_ignored(fleet: Registry) -> None:
    assert fleet.update(presence("a", boot=2))
    assert not fleet.update(presence("a", "offline", boot=1))
    assert fleet.ready() == {"a"}
    assert fleet.update(presence("a", "offline", boot=2))
    assert fleet.ready() == set()


def test_two_agents_that_take_turns_under_one_id_are_told_from_one_that_was_flashed_anew(fleet: Registry) -> None:
    for boot in (7, 8, 1, 2):  # flashed before the third
        fleet.update(presence("a", "offline", boot=max(1, boot - 1)))
        fleet.update(presence("a", boot=boot))
    assert not fleet.is_shared("a")
    for boot in (9, 2):
        fleet.update(presence("a", boot=boot))
    assert fleet.is_shared("a")
    assert not fleet.is_shared("b")


def test_a_device_that_was_flashed_anew_counts_its_boots_from_one(fleet: Registry) -> None:
    fleet.update(presence("a", "offline", boot=7))
    assert fleet.update(presence("a", boot=1))
    assert fleet.ready() == {"a"}
    assert not fleet.update(presence("a", "offline", boot=7))
    assert fleet.ready() == {"a"}


def test_a_failed_device_is_no_member_and_says_why(fleet: Registry) -> None:
    fleet.update(presence("a"))
    fleet.update(presence("b", "failed", detail="too little memory"))
    assert fleet.members() == {"a", "c"}
    assert fleet.ready() == {"a"}
    assert fleet.lost("b") == "too little memory"
    assert fleet.lost("a") is None
    assert fleet.lost("c") is None
    assert fleet.losses() == {"b": "too little memory"}


def test_a_device_that_failed_before_the_aggregator_came_is_waited_for(fleet: Registry) -> None:
    fleet.update(presence("b", "failed", detail="too little memory"), retained=True)
    assert fleet.members() == FLEET
    assert fleet.ready() == set()
    fleet.update(presence("b", "failed", boot=2, detail="too little memory"))
    assert fleet.members() == {"a", "c"}


def test_a_failure_that_was_seen_stays_when_the_broker_repeats_it(fleet: Registry) -> None:
    fleet.update(presence("b", "failed"))
    fleet.update(presence("b", "failed"), retained=True)
    assert fleet.members() == {"a", "c"}


def test_a_device_that_failed_without_saying_why_is_no_member_either(fleet: Registry) -> None:
    fleet.update(presence("b", "failed", detail=""))
    assert fleet.members() == {"a", "c"}
    assert set(fleet.losses()) == {"b"}


def test_a_device_that_starts_again_after_a_failure_is_a_member_again(fleet: Registry) -> None:
    fleet.update(presence("b", "failed", boot=1, detail="broken"))
    fleet.update(presence("b", "online", boot=2))
    assert fleet.members() == FLEET
    assert fleet.losses() == {}


def test_a_device_that_declines_a_job_is_there_but_no_member_until_the_next_job(fleet: Registry) -> None:
    fleet.update(presence("b", "declined", detail="another pack"))
    assert fleet.members() == {"a", "c"}
    assert fleet.ready() == {"b"}
    assert fleet.losses() == {"b": "another pack"}
    fleet.expect_anew()
    assert fleet.members() == FLEET
    assert fleet.losses() == {}


def test_what_a_device_declined_before_the_aggregator_came_was_another_job(fleet: Registry) -> None:
    fleet.update(presence("b", "declined", detail="another pack"), retained=True)
    assert fleet.members() == FLEET
    assert fleet.ready() == {"b"}
    fleet.update(presence("b", "declined", detail="another pack"))
    assert fleet.members() == {"a", "c"}


def test_a_device_that_is_not_expected_is_ignored(fleet: Registry) -> None:
    assert not fleet.update(presence("stranger"))
    assert not fleet.knows("stranger")
    assert fleet.knows("a")
    assert fleet.ready() == set()
    assert fleet.members() == FLEET


def test_without_expectations_any_device_that_is_there_is_a_member() -> None:
    registry = Registry(frozenset())
    assert registry.members() == set()
    assert not registry.knows("a")
    for name, state in (("a", "online"), ("b", "offline"), ("c", "failed")):
        assert registry.update(presence(name, state, detail="broken"))
    assert registry.members() == {"a"}
    assert registry.ready() == {"a"}
    assert registry.knows("b")


def test_a_device_that_has_just_gone_is_still_counted_on(fleet: Registry) -> None:
    fleet.update(presence("a"))
    fleet.update(presence("b"))
    fleet.update(presence("b", "offline"))
    assert fleet.here(patience=10) == {"a", "b"}  # c was never seen
    time.sleep(0.05)
    fleet.update(presence("b", "offline"))  # said again: it has been away since then all the same
    assert fleet.here(patience=0.05) == {"a"}
    fleet.update(presence("b"))
    assert fleet.here(patience=0.05) == {"a", "b"}


def test_what_is_new_of_a_device_is_kept_once(fleet: Registry) -> None:
    store = Store(":memory:")
    for state in ("online", "working"):
        fleet.update(presence("a", state, boot=3, detail="trains"))
    fleet.update(presence("stranger"))
    fleet.save(store)
    (row,) = store.devices()
    assert (row.id, row.state, row.detail, row.boot, row.kit) == ("a", "working", "trains", 3, "1")
    fleet.save(store)  # nothing is new
    assert store.devices() == [row]
    store.close()


def test_who_was_there_when_the_connection_broke_counts_as_gone_until_heard_of_again(fleet: Registry) -> None:
    for name in FLEET:
        fleet.update(presence(name))
    fleet.doubt()
    assert fleet.here(0.05) == FLEET  # nobody could have told
    time.sleep(0.1)
    assert fleet.here(0.05) == FLEET
    fleet.trust()
    fleet.update(presence("a"))
    time.sleep(0.1)
    assert fleet.here(0.05) == {"a"}
    assert fleet.ready() == FLEET
