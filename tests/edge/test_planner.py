"""The cost model and the planner, on costs that follow a known formula."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.prefix import CHUNK
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import BudgetError
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.limits import MEMORY_MARGIN, TIME_MARGIN, Budget
from fleetune.edge.resources.planner import Plan, candidates, choose
from fleetune.edge.resources.powermode import read_power_mode
from fleetune.edge.resources.trial import Trial
from fleetune.edge.resources.workload import Workload, padded_length

Coefficients = tuple[float, float, float, float]
"""Of a constant, a block, a sample, a sample and block; attention takes a hundredth of a sample's at its longest."""
BLOCKS = 6
BASE_MIB = 50.0
KEEP_MIB, RECOMPUTE_MIB = (10.0, 12.0, 3.0, 2.0), (20.0, 0.5, 3.0, 0.25)
KEEP_S, RECOMPUTE_S = (0.002, 0.001, 0.002, 0.004), (0.004, 0.002, 0.002, 0.006)
FORWARD_S = 0.002
LENGTH, LONGEST = 20, 32
TOKEN_S = FORWARD_S / LENGTH
ENTRY_MIB = {"f16": 40.0, "int8": 22.0}
BATCH_MIB = 1.5
EMBEDDING = 0.25
"""Blocks that embedding counts for."""


def workload(
    train: int = 96, evaluate: int = 40, epochs: int = 2, batch: int = 16, max_depth: int = BLOCKS
) -> Workload:
    """Samples of one length: nothing is padded."""
    padded = {size: float(LENGTH) for size in (1, 2, 4, 8, 16, 32, 64) if size <= batch}
    return Workload(train, evaluate, epochs, batch, max_depth, LENGTH, LONGEST, padded, BLOCKS, ENTRY_MIB, BATCH_MIB)


JOB = workload()
PLENTY = 1e9


def formula(c: Coefficients, depth: float, micro_batch: float, length: float) -> float:
    linear, attention = micro_batch * length / LENGTH, micro_batch * (length / LONGEST) ** 2 / 100
    return c[0] + c[1] * depth + (c[2] + c[3] * depth) * (linear + attention)


def memory_of(c: Coefficients, depth: int, micro_batch: int) -> float:
    """At the longest sample."""
    return formula(c, depth, micro_batch, LONGEST)


def seconds_of(c: Coefficients, depth: int, micro_batch: float) -> float:
    """At samples that are all of one length."""
    return formula(c, depth, micro_batch, LENGTH)


CELLS = [*itertools.product((1, BLOCKS), (2, 16), (LONGEST // 4, LONGEST)), (BLOCKS // 2, 16, LONGEST // 2)]


def costs_of(
    memory: tuple[Coefficients, Coefficients] = (KEEP_MIB, RECOMPUTE_MIB),
    seconds: tuple[Coefficients, Coefficients] = (KEEP_S, RECOMPUTE_S),
) -> Costs:
    trials = [
        Trial(
            depth=depth,
            micro_batch=micro_batch,
            length=length,
            recompute=recompute,
            base_mib=BASE_MIB,
            frozen_mib=BASE_MIB,
            peak_mib=BASE_MIB + formula(memory[recompute], depth, micro_batch, length),
            step_s=formula(seconds[recompute], depth, micro_batch, length) / 2,
            step_cpu_s=formula(seconds[recompute], depth, micro_batch, length),
            forward_s=CHUNK * length * TOKEN_S / 2,
            forward_cpu_s=CHUNK * length * TOKEN_S,
        )
        for recompute in (False, True)
        for depth, micro_batch, length in CELLS
    ]
    return Costs(
        pack="pack",
        kit="1",
        onnxruntime="1",
        machine="arm",
        threads=1,
        power_mode="4 cores",
        trials=tuple(trials),
    )


COSTS = costs_of()


def plan_of(
    job: Workload, depth: int, micro_batch: int, *, recompute: bool, cache: str = "f16", mib: float = 80
) -> Plan:
    """The candidate with these numbers; by default one with two entries in the cache."""
    wanted = (depth, micro_batch, recompute, cache, mib)
    found = [p for p in candidates(COSTS, job) if (p.depth, p.micro_batch, p.recompute, p.cache, p.cache_mib) == wanted]
    (plan,) = found
    return plan


amounts = st.floats(0, 100)
coefficients = st.tuples(st.floats(0.01, 100), amounts, amounts, amounts)


# --- the model ----------------------------------------------------------------------------------------------


@given(coefficients, coefficients, st.integers(1, 12), st.integers(1, 64), st.integers(1, LONGEST))
def test_the_model_recovers_the_formula_away_from_the_trials(
    keep: Coefficients, recompute: Coefficients, depth: int, micro_batch: int, length: int
) -> None:
    costs = costs_of(memory=(keep, recompute), seconds=(recompute, keep))
    for policy, memory, seconds in ((False, keep, recompute), (True, recompute, keep)):
        wanted = formula(memory, depth, micro_batch, length)
        assert costs.model.growth_mib(depth, micro_batch, length, recompute=policy) == pytest.approx(wanted, abs=1e-4)
        wanted = formula(seconds, depth, micro_batch, length)
        found = costs.model.step_s(depth, micro_batch, length, recompute=policy)
        assert found == pytest.approx((wanted / 2, wanted), abs=1e-4)


@pytest.mark.parametrize(("samples", "micro_batch", "length"), [(32, 4, 8), (7, 1, 30), (1000, 16, 5)])
def test_a_forward_pass_costs_its_tokens(samples: int, micro_batch: int, length: int) -> None:
    wanted = samples * length * TOKEN_S
    assert COSTS.model.forward_s(samples, micro_batch, length) == pytest.approx((wanted / 2, wanted))


def test_a_round_costs_its_steps_the_frozen_blocks_of_the_job_and_its_evaluation() -> None:
    job = workload(train=104, epochs=3)
    plan = plan_of(job, 4, 8, recompute=False)
    steps = 3 * 13  # 104 samples in micro-batches of 8
    frozen = (104 + 40) * 2 * FORWARD_S
    evaluation = 40 * 4 * FORWARD_S
    assert plan.cpu_s == pytest.approx(steps * seconds_of(KEEP_S, 4, 8) + frozen + evaluation, abs=0.01)
    assert plan.peak_mib == pytest.approx(BASE_MIB + memory_of(KEEP_MIB, 4, 8), abs=0.06)


def test_micro_batches_that_do_not_divide_the_batch_are_counted() -> None:
    job = workload(train=100, evaluate=0, epochs=1, batch=10, max_depth=1)
    plan = plan_of(job, 1, 4, recompute=True)
    in_a_batch = [4, 4, 2]
    assert plan.cpu_s >= 10 * sum(seconds_of(RECOMPUTE_S, 1, size) for size in in_a_batch) - 0.005


def test_no_candidate_is_deeper_than_the_job_or_larger_than_its_batch() -> None:
    plans = candidates(COSTS, workload(train=9, evaluate=1, epochs=1, batch=7, max_depth=3))
    assert {plan.depth for plan in plans} == {1, 2, 3}
    assert max(plan.micro_batch for plan in plans) == 4
    assert {plan.recompute for plan in plans} == {False, True}


def test_costs_are_only_for_their_own_pack_threads_and_length(tiny_bert_pack: Pack) -> None:
    import platform
    from importlib.metadata import version

    costs = Costs(
        tiny_bert_pack.sha256,
        *(version("fleetune"), version("onnxruntime"), platform.machine()),
        threads=2,
        power_mode=read_power_mode(),
        trials=tuple(trial for trial in COSTS.trials if trial.depth == 1),
    )
    assert not costs.stale(tiny_bert_pack, threads=2, length=LONGEST)
    assert not costs.stale(tiny_bert_pack, threads=2, length=LONGEST - 1)
    assert costs.stale(tiny_bert_pack, threads=2, length=LONGEST + 1) == "measured up to 32 tokens, a sample has 33"
    assert costs.stale(tiny_bert_pack, threads=1, length=LONGEST) == "measured with 2 threads, not 1"
    other = msgspec.structs.replace(costs, onnxruntime="1.0")
    assert "onnxruntime 1.0" in other.stale(tiny_bert_pack, threads=2, length=LONGEST)
    assert not other.stale(tiny_bert_pack, length=LONGEST, here=False)
    slower = msgspec.structs.replace(costs, power_mode="1 core, 918 MHz")
    assert "power mode 1 core, 918 MHz, this is" in slower.stale(tiny_bert_pack, threads=2, length=LONGEST)
    deeper = msgspec.structs.replace(costs, trials=(*costs.trials, msgspec.structs.replace(costs.trials[0], depth=60)))
    assert deeper.stale(tiny_bert_pack, length=LONGEST) == "measured up to depth 60, the pack has 3 blocks"
    older = msgspec.structs.replace(costs, kit="0.0.1")
    assert "kit 0.0.1" in older.stale(tiny_bert_pack, length=LONGEST, here=False)
    assert "pack" in COSTS.stale(tiny_bert_pack, threads=1, length=LONGEST)


def test_padding_is_counted_as_training_pads() -> None:
    lengths = np.array([3, 9, 5, 7])
    assert padded_length(lengths, batch=4, micro_batch=1) == 6
    assert padded_length(lengths, batch=4, micro_batch=2) == (2 * 5 + 2 * 9) / 4  # like lengths together
    assert padded_length(lengths, batch=4, micro_batch=4) == 9


def test_longer_samples_cost_more() -> None:
    short, long = workload(), msgspec.structs.replace(JOB, padded=dict.fromkeys(JOB.padded, 2.0 * LENGTH))
    for some, other in zip(candidates(COSTS, short), candidates(COSTS, long), strict=True):
        assert other.cpu_s > some.cpu_s
        assert other.peak_mib == some.peak_mib


def test_a_process_that_is_larger_before_it_trains_is_larger_when_it_does() -> None:
    for usual, larger in zip(candidates(COSTS, JOB), candidates(COSTS, JOB, BASE_MIB + 7), strict=True):
        assert larger.peak_mib == pytest.approx(usual.peak_mib + 7)
        assert larger.cpu_s == usual.cpu_s


# --- the choice ---------------------------------------------------------------------------------------------


def attempt(budget: Budget, job: Workload = JOB) -> Plan | None:
    try:
        return choose(COSTS, job, budget)
    except BudgetError:
        return None


memories, seconds = st.floats(60, 400), st.floats(0.5, 20)


@given(memories, seconds)
def test_a_plan_stays_inside_both_budgets_with_a_margin(memory: float, cpu: float) -> None:
    plan = attempt(Budget(memory, cpu))
    if plan is not None:
        assert plan.peak_mib * (1 + MEMORY_MARGIN) <= memory
        assert plan.cpu_s * (1 + TIME_MARGIN) <= cpu
    assert MEMORY_MARGIN >= 0.05
    assert TIME_MARGIN >= 0.05


@given(memories, seconds)
def test_no_fitting_plan_is_deeper_or_as_deep_and_cheaper(memory: float, cpu: float) -> None:
    plan = attempt(Budget(memory, cpu))
    for other in candidates(COSTS, JOB):
        fits = other.peak_mib * (1 + MEMORY_MARGIN) <= memory and other.cpu_s * (1 + TIME_MARGIN) <= cpu
        if fits and other.cache == "f16":
            assert plan is not None
            assert plan.cache == "f16"
            assert (other.depth, -other.cpu_s) <= (plan.depth, -plan.cpu_s)


@given(memories, seconds, st.floats(0, 200), st.floats(0, 10))
def test_a_larger_budget_never_gives_a_shallower_plan(memory: float, cpu: float, more: float, longer: float) -> None:
    small, large = attempt(Budget(memory, cpu)), attempt(Budget(memory + more, cpu + longer))
    assert (large.depth if large else 0) >= (small.depth if small else 0)


def test_with_plenty_the_plan_is_the_deepest_and_quickest() -> None:
    plan = choose(COSTS, JOB, Budget(PLENTY, PLENTY))
    assert (plan.depth, plan.recompute, plan.bound_by) == (BLOCKS, False, "job")
    assert plan.cpu_s == min(p.cpu_s for p in candidates(COSTS, JOB) if p.depth == BLOCKS)


def test_recomputing_is_chosen_when_memory_bites() -> None:
    roomy = (BASE_MIB + memory_of(KEEP_MIB, BLOCKS, 1)) * (1 + MEMORY_MARGIN)
    assert not choose(COSTS, JOB, Budget(roomy + 1, PLENTY)).recompute
    plan = choose(COSTS, JOB, Budget(roomy - 1, PLENTY))
    assert (plan.depth, plan.recompute) == (BLOCKS, True)


def test_smaller_micro_batches_are_chosen_when_memory_bites() -> None:
    assert choose(COSTS, JOB, Budget(PLENTY, PLENTY)).micro_batch == 16
    assert (
        choose(
            COSTS, JOB, Budget((BASE_MIB + memory_of(KEEP_MIB, BLOCKS, 4)) * (1 + MEMORY_MARGIN) + 1, PLENTY)
        ).micro_batch
        == 4
    )


def test_the_limit_that_stands_in_the_way_is_named() -> None:
    cheapest = {d: min(p.cpu_s for p in candidates(COSTS, JOB) if p.depth == d) * (1 + TIME_MARGIN) for d in (3, 4)}
    by_time = choose(COSTS, JOB, Budget(PLENTY, (cheapest[3] + cheapest[4]) / 2))
    assert (by_time.depth, by_time.bound_by) == (3, "cpu")
    smallest = {
        d: min(p.peak_mib for p in candidates(COSTS, JOB) if p.depth == d) * (1 + MEMORY_MARGIN) for d in (3, 4)
    }
    by_memory = choose(COSTS, JOB, Budget((smallest[3] + smallest[4]) / 2, PLENTY))
    assert (by_memory.depth, by_memory.bound_by) == (3, "memory")


def test_two_limits_that_bind_only_together_are_both_named() -> None:
    # Deeper plans fit the memory when recomputing and fit the time when keeping, but never both.
    deep = [p for p in candidates(COSTS, JOB) if p.depth == 2]
    memory = min(p.peak_mib for p in deep if not p.recompute) * (1 + MEMORY_MARGIN) - 0.5
    cpu = min(p.cpu_s for p in deep) * (1 + TIME_MARGIN) + 0.01
    plan = choose(COSTS, JOB, Budget(memory, cpu))
    assert (plan.depth, plan.bound_by) == (1, "memory+cpu")


# --- the disk -----------------------------------------------------------------------------------------------


def test_with_room_for_one_entry_the_frozen_blocks_start_from_the_samples() -> None:
    job = workload(epochs=3, max_depth=5)
    two, one = (plan_of(job, 4, 8, recompute=False, mib=mib) for mib in (80, 40))
    once = (96 + 40) * FORWARD_S
    assert two.cpu_s - one.cpu_s == pytest.approx(once * (1 - (EMBEDDING + 2)))
    assert two.peak_mib == one.peak_mib
    deepest = [plan_of(job, 5, 8, recompute=False, mib=mib) for mib in (80, 40)]
    assert deepest[0].cpu_s == pytest.approx(deepest[1].cpu_s)  # what it needs is there from the preparation


def test_without_a_cache_the_frozen_blocks_run_for_each_sample_of_each_epoch() -> None:
    job = msgspec.structs.replace(workload(epochs=3, max_depth=5), padded={4: 2.0 * LENGTH})
    cached, without = (
        plan_of(job, 4, 4, recompute=False, **some) for some in ({"mib": 80}, {"cache": "none", "mib": 0})
    )
    once, always = (96 + 40) * FORWARD_S, (3 * 96 * 2 + 40) * FORWARD_S
    assert without.cpu_s - cached.cpu_s == pytest.approx(always * (EMBEDDING + 2) - once)


def test_without_a_cache_a_batchs_hidden_states_and_a_frozen_blocks_weights_take_memory() -> None:
    def more(depth: int, *, recompute: bool) -> float:
        without = plan_of(JOB, depth, 8, recompute=recompute, cache="none", mib=0)
        return without.peak_mib - plan_of(JOB, depth, 8, recompute=recompute).peak_mib

    assert more(2, recompute=True) == pytest.approx(BATCH_MIB)  # its weights go through one buffer anyway
    assert more(BLOCKS, recompute=False) == pytest.approx(BATCH_MIB)  # no block is frozen
    a_block = memory_of(KEEP_MIB, 3, 8) - memory_of(KEEP_MIB, 2, 8)
    assert more(2, recompute=False) == pytest.approx(BATCH_MIB + a_block)


@pytest.mark.parametrize(("disk", "cache", "mib"), [
    (PLENTY, "f16", 80),
    (80, "f16", 80),
    (79.9, "f16", 40),
    (39.9, "int8", 22),
    (21.9, "none", 0),
    (0, "none", 0),
])  # fmt: skip
def test_float16_is_preferred_then_int8_then_no_cache(disk: float, cache: str, mib: float) -> None:
    plan = choose(COSTS, JOB, Budget(PLENTY, PLENTY, disk))
    assert (plan.depth, plan.cache, plan.cache_mib) == (BLOCKS, cache, mib)
    assert plan.missing_mib == pytest.approx(22 - disk if cache == "none" else 0)


@given(memories, seconds, st.floats(0, 100))
def test_a_plan_stays_inside_the_disk_and_no_deeper_one_would(memory: float, cpu: float, disk: float) -> None:
    plan = attempt(Budget(memory, cpu, disk))
    fitting = [
        other
        for other in candidates(COSTS, JOB)
        if other.peak_mib * (1 + MEMORY_MARGIN) <= memory
        and other.cpu_s * (1 + TIME_MARGIN) <= cpu
        and other.cache_mib <= disk
    ]
    assert (plan is None) == (not fitting)
    if plan is not None:
        assert plan.cache_mib <= disk
        assert plan.depth == max(other.depth for other in fitting)


def cpu_for(depth: int, cache: str) -> float:
    return min(p.cpu_s for p in candidates(COSTS, JOB) if (p.depth, p.cache) == (depth, cache)) * (1 + TIME_MARGIN)


def test_float16_is_preferred_even_if_it_costs_more_seconds() -> None:
    job = workload()
    one, two = (plan_of(job, 4, 16, recompute=False, **some) for some in ({"mib": 40}, {"cache": "int8", "mib": 44}))
    assert one.cpu_s > two.cpu_s
    plan = choose(COSTS, job, Budget(PLENTY, one.cpu_s * (1 + TIME_MARGIN) + 0.001, 50))
    assert (plan.depth, plan.cache, plan.cache_mib) == (4, "f16", 40)


def test_the_disk_is_not_named_if_a_smaller_cache_would_do() -> None:
    assert choose(COSTS, JOB, Budget(PLENTY, cpu_for(4, "int8"), 50)).bound_by == "cpu"


def test_a_deeper_plan_without_a_cache_is_better_than_a_shallow_one_with_it() -> None:
    assert choose(COSTS, JOB, Budget(PLENTY, cpu_for(4, "none"), 0)).depth == 4


def test_a_small_disk_forces_a_shallower_plan_and_is_named() -> None:
    cpu = cpu_for(5, "f16")
    assert choose(COSTS, JOB, Budget(PLENTY, cpu, 80)).depth == 5
    plan = choose(COSTS, JOB, Budget(PLENTY, cpu, 0))
    assert plan.depth < 5
    assert plan.bound_by == "cpu+disk"  # more of either would do
    roomy = choose(COSTS, JOB, Budget(PLENTY, cpu, 80))
    assert roomy.bound_by == "cpu"


def test_what_the_disk_lacks_is_named_when_nothing_fits_without_a_cache() -> None:
    with pytest.raises(BudgetError) as caught:
        choose(COSTS, JOB, Budget(PLENTY, cpu_for(1, "none") - 0.01, 10))
    found = [float(number) for number in re.findall(r"(\d+\.\d) MiB", caught.value.what)]
    assert found == [22, 12, 10]
    assert "budget: disk" in caught.value.what
    assert "disk" in caught.value.remedy


def test_the_planned_bytes_are_those_on_the_disk(text_data: Path, tiny_bert_pack: Pack, tmp_path: Path) -> None:
    data, manifest = read_dataset(text_data, tiny_bert_pack), tiny_bert_pack.manifest
    job = Workload.of(data, manifest, epochs=1, batch=4, max_depth=2)
    assert job.blocks == 3
    assert job.batch_mib * (1 << 20) == 4 * data.lengths[:12].max() * 64 * 4
    for codec, mib in job.entry_mib.items():
        folder = tmp_path / codec
        cache = PrefixCache(folder, Backbone(tiny_bert_pack, threads=1), data, micro_batch=4, codec=codec)
        cache.prefix(2, Expert(Layout.of(manifest, classes=2)))
        written = sum(file.stat().st_size for file in folder.glob("*/*"))
        assert mib * (1 << 20) == written


# --- nothing fits -------------------------------------------------------------------------------------------


def refusal(memory: float, cpu: float) -> BudgetError:
    with pytest.raises(BudgetError) as caught:
        choose(COSTS, JOB, Budget(memory, cpu))
    return caught.value


def least(of: Callable[[Plan], float]) -> float:
    return min(of(plan) for plan in candidates(COSTS, JOB) if plan.depth == 1)


def test_a_refusal_says_how_many_mib_are_missing() -> None:
    need = least(lambda plan: plan.peak_mib) * (1 + MEMORY_MARGIN)
    error = refusal(50, PLENTY)
    found = [int(number) for number in re.findall(r"(\d+) MiB", error.what)]
    assert found == [round(need), round(need - 50), 50]
    assert "memory" in error.what
    assert "memory" in error.remedy


def test_a_refusal_says_how_many_cpu_seconds_are_missing() -> None:
    need = least(lambda plan: plan.cpu_s) * (1 + TIME_MARGIN)
    error = refusal(PLENTY, 0.5)
    found = [float(number) for number in re.findall(r"\d+\.\d", error.what)]
    assert found == pytest.approx([need, need - 0.5, 0.5], abs=0.051)
    assert "budget: cpu" in error.what
    assert "CPU" in error.remedy


def test_a_refusal_says_when_each_limit_alone_would_do() -> None:
    memory, cpu = (
        least(lambda plan: plan.peak_mib) * (1 + MEMORY_MARGIN),
        least(lambda plan: plan.cpu_s) * (1 + TIME_MARGIN),
    )
    assert "at once" in refusal(memory + 0.1, cpu + 0.01).what


def test_a_prediction_without_margin_does_not_fit() -> None:
    smallest = least(lambda plan: plan.peak_mib)
    refusal(smallest, PLENTY)
    assert choose(COSTS, JOB, Budget(smallest * (1 + MEMORY_MARGIN) + 0.01, PLENTY)).depth >= 1
