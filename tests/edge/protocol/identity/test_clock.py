"""The clock of a board that may wake up in the past, or in the future."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from fleetune.edge.protocol.identity import clock as module
from fleetune.edge.protocol.identity.clock import Clock

NOW = 1_800_000_000.0
DAY = 86400.0


class Machine:
    """A machine whose clocks a test sets: the system's may jump, the monotonic one only runs."""

    def __init__(self) -> None:
        self.system, self.running = NOW, 1000.0

    def time(self) -> float:
        return self.system

    def monotonic(self) -> float:
        return self.running

    def wait(self, seconds: float) -> None:
        self.system += seconds
        self.running += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.setattr(module, "time", machine)
    return machine


def test_a_clock_that_is_right_is_believed(machine: Machine) -> None:
    clock = Clock(NOW - DAY)
    assert clock.now() == NOW
    machine.wait(10)
    assert clock.now() == NOW + 10


def test_a_board_that_wakes_up_in_1970_goes_on_from_what_has_passed_for_sure(machine: Machine) -> None:
    machine.system = 0.0
    clock = Clock(NOW)
    machine.wait(10)
    assert clock.now() == NOW + 10


def test_what_the_authority_has_signed_moves_the_clock_ahead_and_never_back(machine: Machine) -> None:
    machine.system = 0.0
    clock = Clock(NOW)
    clock.passed(NOW + DAY)
    machine.wait(10)
    clock.passed(NOW - DAY)
    assert clock.now() == clock.at_least == NOW + DAY + 10


def test_an_answer_sets_a_clock_that_is_behind(machine: Machine) -> None:
    machine.system = 0.0
    clock = Clock(NOW - DAY)
    clock.set(NOW)
    machine.wait(10)
    assert clock.now() == NOW + 10


def test_an_answer_sets_a_clock_that_is_ahead(machine: Machine) -> None:
    machine.system = NOW + 5000 * DAY
    clock = Clock(NOW - DAY)
    clock.set(NOW)
    machine.wait(10)
    assert clock.now() == NOW + 10


def test_no_answer_sets_a_clock_to_before_what_has_passed_for_sure(machine: Machine) -> None:
    clock = Clock(NOW)
    clock.set(NOW - DAY)
    assert clock.now() == NOW
    machine.wait(10)
    assert clock.now() == NOW + 10


def test_a_clock_that_was_told_the_time_does_not_jump_when_the_systems_is_set_right(machine: Machine) -> None:
    """A board asks the aggregator; a minute later NTP sets its clock."""
    machine.system = 0.0
    clock = Clock(NOW - DAY)
    clock.set(NOW)
    machine.wait(60)
    machine.system = NOW + 60
    assert clock.now() == NOW + 60


def test_what_somebody_said_who_was_wrong_is_taken_back_by_an_answer(machine: Machine) -> None:
    """An aggregator whose clock was a year ahead, and was set right."""
    clock = Clock(NOW - DAY)
    clock.told(NOW + 365 * DAY)
    assert clock.now() == NOW + 365 * DAY
    clock.set(NOW)
    assert clock.now() == NOW


def test_so_is_an_answer_that_was_wrong(machine: Machine) -> None:
    clock = Clock(NOW - DAY)
    clock.set(NOW + 365 * DAY)
    clock.set(NOW)
    assert clock.now() == NOW


def test_an_earlier_time_that_was_told_in_passing_does_not_count(machine: Machine) -> None:
    clock = Clock(NOW - DAY)
    clock.told(NOW - 10)
    assert clock.now() == NOW


def test_what_was_told_is_not_for_sure(machine: Machine) -> None:
    clock = Clock(NOW)
    clock.told(NOW + DAY)
    clock.set(NOW + 2 * DAY)
    machine.wait(5)
    assert clock.at_least == NOW + 5


def test_the_real_clock_is_unix_time() -> None:
    assert abs(Clock().now() - time.time()) < 1
