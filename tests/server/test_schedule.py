"""SAL's schedule: the depth grows when the fleet stops gaining, up to the deepest allowed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.server.job import ScheduleSettings
from fleetune.server.schedule import scheduled_depth

results = st.lists(st.floats(0, 1), max_size=20)
schedules = st.builds(
    ScheduleSettings,
    start=st.integers(1, 4),
    step=st.integers(0, 3),
    window=st.integers(2, 5),
    threshold=st.floats(-0.5, 0.5),
)


@pytest.mark.parametrize(("history", "depth"), [
    ([], 1),
    ([0.5], 1),
    ([0.5, 0.6], 1),
    ([0.5, 0.505], 2),
    ([0.5, 0.4], 2),
    ([0.5, 0.6, 0.601], 2),
    ([0.5, 0.5, 0.5], 2),
    ([0.5, 0.5, 0.5, 0.5], 3),
    ([0.5, 0.5, 0.7, 0.9], 2),
])  # fmt: skip
def test_the_depth_after_these_results(history: list[float], depth: int) -> None:
    assert scheduled_depth(history, ScheduleSettings(start=1, step=1, window=2, threshold=0.01), max_depth=6) == depth


def test_a_longer_queue_looks_at_the_mean_gain() -> None:
    settings = ScheduleSettings(start=2, step=2, window=3, threshold=0.1)
    assert scheduled_depth([0.1, 0.2, 0.4], settings, max_depth=9) == 2
    assert scheduled_depth([0.1, 0.0, 0.2], settings, max_depth=9) == 4


def test_a_gain_of_exactly_the_threshold_is_enough() -> None:
    settings = ScheduleSettings(start=1, step=1, window=2, threshold=0.25)
    assert scheduled_depth([0.5, 0.75], settings, max_depth=6) == 1
    assert scheduled_depth([0.5, 0.74], settings, max_depth=6) == 2


def test_the_queue_starts_over_after_each_growth() -> None:
    settings = ScheduleSettings(start=1, step=1, window=3, threshold=0.01)
    depths = [scheduled_depth([0.5] * rounds, settings, max_depth=9) for rounds in range(10)]
    assert depths == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_a_step_of_zero_never_deepens() -> None:
    assert scheduled_depth([0.5] * 20, ScheduleSettings(start=3, step=0), max_depth=6) == 3


@given(results, schedules, st.integers(1, 12))
def test_the_depth_stays_within_its_limits_and_never_shrinks(
    history: list[float], settings: ScheduleSettings, max_depth: int
) -> None:
    depths = [scheduled_depth(history[:n], settings, max_depth) for n in range(len(history) + 1)]
    assert depths == sorted(depths)
    assert depths[0] == min(settings.start, max_depth)
    assert all(1 <= depth <= max_depth for depth in depths)
    assert all(later - depth <= settings.step for depth, later in pairwise(depths))


@given(results, schedules)
def test_the_history_is_not_changed(history: list[float], settings: ScheduleSettings) -> None:
    before = list(history)
    assert scheduled_depth(history, settings, 6) == scheduled_depth(history, settings, 6)
    assert history == before
