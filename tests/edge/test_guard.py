"""The guard, against time that is really spent, and training that does with less memory when it asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.edge.agent.state import JobStore
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.methods.base import Device, ExpertSettings, Round
from fleetune.edge.methods.local import ExpertLearner, LocalRun
from fleetune.edge.pack.pack import Pack
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard, Verdict
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

NOTHING = (0.0, 0.0)


def spend(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


# --- time ---------------------------------------------------------------------------------------------------


def test_training_ends_before_the_cpu_seconds_are_spent() -> None:
    start, guard, steps = time.process_time(), Guard(0.5), 0
    while guard.before_step((0.0, 0.2)) is Verdict.GO:
        spend(0.04)
        steps += 1
    assert guard.stopped_early
    assert guard.stopped_for == "cpu"
    assert 4 <= steps <= 7
    spend(0.2)
    assert time.process_time() - start <= 0.5


def test_training_ends_before_the_deadline() -> None:
    start, guard, steps = time.monotonic(), Guard(seconds=0.5), 0
    while guard.before_step((0.2, 0.0)) is Verdict.GO:
        time.sleep(0.04)
        steps += 1
    assert guard.stopped_for == "time"
    assert 1 <= steps <= 7
    assert time.monotonic() - start <= 0.31


def test_the_next_step_is_kept_back_too() -> None:
    guard = Guard(0.25)
    assert guard.before_step(NOTHING) is Verdict.GO
    spend(0.15)
    assert guard.before_step(NOTHING) is Verdict.STOP


def test_a_round_without_a_limit_goes_on() -> None:
    guard = Guard()
    spend(0.01)
    assert guard.before_step((1e9, 1e9)) is Verdict.GO
    assert not guard.stopped_early


# --- memory -------------------------------------------------------------------------------------------------

BLOCK_MIB, SAMPLE_MIB = 10.0, 1.0


def trial(depth: int, micro_batch: int, length: int, recompute: bool) -> Trial:
    """Each active block takes 10 MiB, and 1 MiB for each sample of 8 tokens."""
    peak = 60.0 + depth * (BLOCK_MIB + SAMPLE_MIB * micro_batch * length / 8)
    return Trial(depth, micro_batch, length, recompute, 60.0, 60.0, peak, 0.01, 0.01, 1e-6, 1e-6)


GRID = [(depth, micro, length) for depth in (1, 3) for micro in (1, 8) for length in (4, 8, 16)]
COSTS = Costs(
    "p", "1", "1", "x", 1, "1 core", tuple(trial(*cell, recompute) for cell in GRID for recompute in (False, True))
)
SETTINGS: dict[str, Any] = {
    "rank": 4, "targets": "query,value", "classes": 2, "seed": 0, "max_depth": 3, "depth": 3, "epochs": 2, "batch": 4,
    "optimiser": "adam", "learning_rate": 1e-2, "weight_decay": 0.01,
}  # fmt: skip


class Run:
    """Training of a tiny pack in which memory becomes short when a test says so."""

    def __init__(self, pack: Pack, data: Path, folder: Path, *, recompute: bool = False) -> None:
        self.backbone = Backbone(pack, threads=1)
        dataset = read_dataset(data, pack)
        self.device = Device(
            id="cam-01",
            backbone=self.backbone,
            dataset=dataset,
            cache=PrefixCache(folder / "cache", self.backbone, dataset, micro_batch=4),
            plan=Plan(3, 4, recompute, "f16", 1.0, 60.0, 1.0, 1.0, None),
            costs=COSTS,
            store=JobStore(folder / "private", "r1", "job"),
            progress=lambda _share, _loss: None,
        )
        self.expert = Expert.initial(Layout.of(pack.manifest, 2), seed=0)
        self.initial = self.expert.vector.copy()
        self.steps = 0

    def train(self, short_mib: Callable[[int], float], number: int = 1) -> Guard:
        """Train; ``short_mib`` says from the steps so far how much memory is missing."""
        guard = Guard(excess_mib=lambda: short_mib(self.steps))
        run = LocalRun(self.device, ExpertSettings(**SETTINGS), self.expert)

        def count(_indices: Any, _features: Any) -> None:
            self.steps += 1

        learner = ExpertLearner(self.expert, ExpertSettings(**SETTINGS), on_batch=count)
        run.train(learner, Round("global", number, {}, {}, guard), np.random.default_rng(0), evaluated=0)
        return guard

    def changed(self, block: int) -> bool:
        before = self.expert.layout.views(self.initial)
        return any((before[n] != t).any() for n, t in self.expert.tensors.items() if n.startswith(f"blocks.{block}."))


@pytest.fixture
def make(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(**options: Any) -> Run:
        make.count += 1  # type: ignore[attr-defined]
        return Run(tiny_bert_pack, text_data, tmp_path / str(make.count), **options)  # type: ignore[attr-defined]

    make.count = 0  # type: ignore[attr-defined]
    return make


ALL = 6
"""Steps of a round: 12 samples, batches of 4, twice."""


@pytest.mark.parametrize("recompute", [False, True])
def test_smaller_micro_batches_come_first_and_change_nothing_that_is_learned(
    recompute: bool, make: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    usual, eased = make(recompute=recompute), make(recompute=recompute)
    usual.train(lambda _steps: 0.0)
    pending = [5.0]
    guard = eased.train(lambda steps: pending.pop() if steps == 2 and pending else 0.0)
    assert (guard.eased, guard.stopped_early) == (1, False)
    assert eased.steps == usual.steps == ALL
    assert "micro-batch 2 and 3 of 3 active blocks" in caplog.text
    np.testing.assert_allclose(eased.expert.vector, usual.expert.vector, atol=2e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_then_the_lowest_active_block_is_frozen_as_it_is(
    recompute: bool, make: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run, pending, seen = make(recompute=recompute), [15.0], []

    def short(steps: int) -> float:
        seen.append(run.expert.layout.views(run.expert.vector.copy()))
        return pending.pop() if steps == 2 and pending else 0.0

    run.train(short)
    assert "micro-batch 1 and 2 of 3 active blocks" in caplog.text
    assert run.steps == ALL
    assert all(run.changed(block) for block in range(3))
    at_easing, at_end = seen[2], run.expert.tensors
    for name, tensor in at_end.items():
        frozen = name.startswith("blocks.0.")
        assert (tensor == at_easing[name]).all() == frozen, name


def test_a_frozen_block_goes_on_counting_in_what_the_others_see(make: Callable[..., Run]) -> None:
    """After easing, the gradient of the blocks above is that of the whole network."""
    run, pending = make(), [15.0]
    found: dict[str, Any] = {}

    def short(steps: int) -> float:
        if steps == 2 and pending:
            return pending.pop()
        if steps == 3 and "after" not in found:
            found["after"] = run.expert.vector.copy()
        return 0.0

    run.train(short)
    other = make()
    other.train(lambda _steps: 0.0)
    assert not np.allclose(run.expert.tensors["blocks.2.query.B"], other.expert.tensors["blocks.2.query.B"], atol=1e-7)
    head = np.abs(run.expert.tensors["head.weight"] - other.expert.tensors["head.weight"]).max()
    moved = np.abs(run.expert.tensors["head.weight"] - run.expert.layout.views(run.initial)["head.weight"]).max()
    assert head < moved / 3


def test_at_last_the_round_ends_with_what_it_has(make: Callable[..., Run]) -> None:
    run = make()
    guard = run.train(lambda steps: 1e9 if steps >= 2 else 0.0)
    assert guard.stopped_for == "memory"
    assert run.steps == 3  # one with all that could be given back
    assert run.changed(0)


def test_what_was_learned_is_on_disk_before_memory_is_given_back(make: Callable[..., Run]) -> None:
    run = make()
    pending = [5.0]
    kept: dict[str, Any] = {}

    def short(steps: int) -> float:
        if steps == 3 and pending:
            kept["expert"] = run.expert.vector.copy()
            return pending.pop()
        return 0.0

    run.train(short)
    stored = run.device.store.load("unfinished")
    assert stored is not None
    for name, tensor in run.expert.layout.views(kept["expert"]).items():
        np.testing.assert_array_equal(stored[name], tensor)


def test_a_round_that_was_killed_goes_on_where_memory_ran_short(make: Callable[..., Run]) -> None:
    class KilledError(Exception):
        pass

    run = make()

    def short(steps: int) -> float:
        if run.steps == 3:
            raise KilledError
        return 5.0 if run.steps == 2 else 0.0

    with pytest.raises(KilledError):
        run.train(short)
    assert run.steps == 3
    run.expert.vector[...] = run.initial  # as a new process begins
    run.train(lambda _steps: 0.0)
    assert run.steps == 3 + ALL - 2
    run.steps = 0
    run.train(lambda _steps: 0.0, number=2)  # another round starts from its beginning
    assert run.steps == ALL
