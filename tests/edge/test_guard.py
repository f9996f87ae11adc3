"""The guard, against CPU seconds that are really spent."""

from __future__ import annotations

import time

from fleetune.edge.resources.guard import Guard


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_training_ends_before_the_budget_is_spent() -> None:
    start, guard, steps = time.process_time(), Guard(0.5), 0
    while not guard.must_stop(reserve=0.2):
        spend(0.04)
        steps += 1
    assert guard.stopped_early
    assert 4 <= steps <= 7
    spend(0.2)
    assert time.process_time() - start <= 0.5


def test_the_next_step_is_kept_back_too() -> None:
    guard = Guard(0.25)
    assert not guard.must_stop(reserve=0.0)
    spend(0.15)
    assert guard.must_stop(reserve=0.0)


def test_a_round_without_a_limit_goes_on() -> None:
    guard = Guard()
    spend(0.01)
    assert not guard.must_stop(reserve=1e9)
    assert not guard.stopped_early


def test_a_budget_that_the_round_does_not_reach_is_left_alone() -> None:
    guard = Guard(1e9)
    for _ in range(3):
        assert not guard.must_stop(reserve=1.0)
    assert not guard.stopped_early
