"""Strategies: which round follows which, as a pure function of the rounds that closed."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fleetune.server.job import Job, ScheduleSettings
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, NextRound, Strategy

EXPERT, GATE = ("blocks.", "head."), ("gate.",)


def job(method: str, rounds: dict[str, int], max_depth: int = 6, **schedule: Any) -> Job:
    return Job(
        id=method,
        method=method,
        backbone="b",
        quantisation="nf4",
        shapes={},
        rounds=rounds,
        settings={"max_depth": max_depth},
        schedule=ScheduleSettings(**schedule),
    )


FEDMS = job("fedms", {"global": 3, "personal": 2})


def play(leader: Job, accuracies: list[float]) -> list[NextRound]:
    """All rounds of a job, where training round i ends with a mean accuracy of accuracies[i]."""
    strategy = STRATEGIES[leader.method](leader)
    closed: list[ClosedRound] = []
    announced: list[NextRound] = []
    scores = iter(accuracies)
    while (upcoming := strategy.next(closed)) is not None:
        announced.append(upcoming)
        closed.append(ClosedRound(upcoming.stage, {} if upcoming.stage == "prepare" else {"val": next(scores, 0.9)}))
        assert len(closed) <= 50
    return announced


# --- FedMS --------------------------------------------------------------------------------------------------


def test_fedms_prepares_trains_the_global_expert_then_the_personal_ones_and_evaluates() -> None:
    announced = play(FEDMS, [])
    assert [upcoming.stage for upcoming in announced] == [
        "prepare",
        *["global"] * 3,
        "prepare",
        *["personal"] * 2,
        "evaluate",
    ]
    assert STRATEGIES["fedms"](FEDMS).rounds == 5


def test_fedms_sends_the_expert_in_stage_one_once_more_before_stage_two_and_then_the_gate_alone() -> None:
    announced = play(FEDMS, [])
    assert [upcoming.broadcast for upcoming in announced] == [(), *[EXPERT] * 3, EXPERT, *[GATE] * 2, GATE]


def test_fedms_takes_nothing_up_but_what_the_stage_trains() -> None:
    trained = {upcoming.stage: upcoming.trained for upcoming in play(FEDMS, [])}
    assert trained == {"prepare": (), "global": EXPERT, "personal": GATE, "evaluate": ()}


def test_fedms_deepens_when_validation_stands_still() -> None:
    leader = job("fedms", {"global": 6, "personal": 1}, start=1, step=2, window=2, threshold=0.01)
    announced = play(leader, [0.5, 0.5, 0.6, 0.7, 0.7, 0.7])
    depths = [upcoming.depth for upcoming in announced if upcoming.stage == "global"]
    assert depths == [1, 1, 3, 3, 3, 5]


def test_fedms_goes_no_deeper_than_the_job() -> None:
    leader = job("fedms", {"global": 9, "personal": 1}, max_depth=2, start=1, step=1, window=2, threshold=1)
    assert max(upcoming.depth for upcoming in play(leader, [])) == 2


@pytest.mark.parametrize("accuracies", [[0.5, 0.9, 0.95], [0.5, 0.5, 0.9], [0.5, 0.9, 0.9], [0.9, 0.5, 0.4]])
def test_in_stage_two_the_depth_stays_where_stage_one_left_it(accuracies: list[float]) -> None:
    leader = job("fedms", {"global": 3, "personal": 3}, start=1, step=1, window=2, threshold=0.01)
    announced = play(leader, [*accuracies, 0.1, 0.1, 0.1])
    left = [upcoming.depth for upcoming in announced if upcoming.stage == "global"][-1]
    assert {upcoming.depth for upcoming in announced[4:]} == {left}
    assert [upcoming.stage for upcoming in announced[4:]] == ["prepare", *["personal"] * 3, "evaluate"]


# --- baselines ----------------------------------------------------------------------------------------------


def test_standalone_trains_for_its_rounds_and_nothing_is_sent() -> None:
    leader = job("standalone", {"train": 4}, start=1, step=1, window=2, threshold=0.01)
    announced = play(leader, [0.5, 0.5, 0.5, 0.5])
    assert [upcoming.stage for upcoming in announced] == ["prepare", *["train"] * 4]
    assert [upcoming.depth for upcoming in announced[1:]] == [1, 1, 2, 2]
    assert all(upcoming.broadcast == upcoming.trained == () for upcoming in announced)
    assert STRATEGIES["standalone"](leader).rounds == 4


def test_the_frozen_head_is_one_round() -> None:
    leader = job("frozen-head", {"train": 1})
    assert [upcoming.stage for upcoming in play(leader, [])] == ["prepare", "train"]
    assert STRATEGIES["frozen-head"](leader).rounds == 1


# --- all ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leader", [FEDMS, job("standalone", {"train": 3}), job("frozen-head", {"train": 1})])
def test_a_strategy_is_a_pure_function_of_the_history(leader: Job) -> None:
    strategy: Strategy = STRATEGIES[leader.method](leader)
    closed: list[ClosedRound] = []
    while (upcoming := strategy.next(closed)) is not None:
        before = copy.deepcopy(closed)
        restarted = STRATEGIES[leader.method](leader)
        assert restarted.next(closed) == strategy.next(closed) == upcoming
        assert closed == before
        closed.append(ClosedRound(upcoming.stage, {"val": 0.5 + len(closed) / 100}))
    for count in reversed(range(len(closed))):  # asked about the past again, it gives the same answers
        assert strategy.next(closed[:count]) is not None
    assert strategy.next(closed) is None
    assert strategy.next([*closed, closed[-1]]) is None
