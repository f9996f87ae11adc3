"""Chooses what a device trains: the deepest plan that stays inside its budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.cache import split
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.protocol.errors import BudgetError
from fleetune.edge.resources.costs import Costs

MEMORY_MARGIN = 0.1
"""Share of the predicted peak that is kept free, for what the trials did not see."""

CPU_MARGIN = 0.15
"""Share of the predicted CPU seconds that is kept free."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device leaves over for training.

    Attributes:
        memory_mib: MiB for the agent's process.
        cpu_s: CPU seconds a round.
    """

    memory_mib: float
    cpu_s: float


class Workload(msgspec.Struct, frozen=True):
    """What a round asks for.

    Attributes:
        train: Training samples.
        evaluate: Samples that are evaluated each round.
        epochs: Passes over the training samples.
        batch: Samples an optimiser step.
        max_depth: Deepest that any device of the job goes.
        length: Mean tokens of a sample.
        padded: Micro-batch → mean tokens of a sample when each is padded to the longest of its micro-batch.
    """

    train: int
    evaluate: int
    epochs: int
    batch: int
    max_depth: int
    length: float
    padded: Mapping[int, float]

    @classmethod
    def of(cls, dataset: Dataset, *, epochs: int, batch: int, max_depth: int) -> Workload:
        """What a round asks of a device with these samples."""
        lengths = dataset.lengths[dataset.indices("train")]
        return cls(
            train=len(lengths),
            evaluate=len(dataset.indices("val")) + len(dataset.indices("test")),
            epochs=epochs,
            batch=batch,
            max_depth=max_depth,
            length=float(dataset.lengths.mean()),
            padded={size: padded_length(lengths, batch, size) for size in MICRO_BATCHES if size <= batch},
        )


class Plan(msgspec.Struct, frozen=True):
    """What the device does.

    Attributes:
        depth: Active blocks, from the head.
        micro_batch: Samples that go through a block at once.
        recompute: Whether activations are recomputed.
        peak_mib: Predicted peak of the process, without margin.
        cpu_s: Predicted CPU seconds of a round, without margin.
        bound_by: What keeps it from going deeper: ``memory``, ``cpu``, ``memory+cpu``, or ``job`` at its deepest.
    """

    depth: int
    micro_batch: int
    recompute: bool
    peak_mib: float
    cpu_s: float
    bound_by: str


def padded_length(lengths: NDArray[np.int64], batch: int, micro_batch: int) -> float:
    """Mean tokens of a sample when training pads each to the longest of its micro-batch.

    Args:
        lengths: Tokens of each sample [n].
        batch: Samples an optimiser step, drawn at random and cut into micro-batches of like length.
        micro_batch: Samples that go through a block at once.
    """
    order = np.random.default_rng(0).permutation(lengths)
    groups = [group for some in split(order, batch) for group in split(np.sort(some), micro_batch)]
    return sum(len(group) * int(group.max()) for group in groups) / len(lengths)


def candidates(costs: Costs, workload: Workload, base_mib: float | None = None) -> list[Plan]:
    """Every plan that the job allows, with its predicted costs.

    Args:
        costs: What training costs here.
        workload: What a round asks for.
        base_mib: Peak of the process that is to train, before it does; by default as in the trials.
    """
    base = costs.base_mib if base_mib is None else base_mib
    found = []
    forward = workload.length * costs.forward_cpu_s
    for depth in range(1, workload.max_depth + 1):
        for micro_batch, padded in workload.padded.items():
            for recompute in (False, True):
                full, rest = divmod(workload.train, workload.batch)
                runs = full * math.ceil(workload.batch / micro_batch) + math.ceil(rest / micro_batch)
                tokens = workload.train * padded / runs
                train = workload.epochs * runs * costs.step_cpu_s(depth, tokens, recompute=recompute)
                # The frozen blocks between the job's boundary and this device's own carry others' adapters, so they
                # run once a round for every sample; so does the whole suffix for evaluation.
                below = (workload.train + workload.evaluate) * (workload.max_depth - depth)
                above = workload.evaluate * depth
                cpu = train + (below + above) * forward
                peak = base + costs.growth_mib(depth, micro_batch, recompute=recompute)
                found.append(Plan(depth, micro_batch, recompute, peak, cpu, bound_by=""))
    return found


def choose(costs: Costs, workload: Workload, budget: Budget, base_mib: float | None = None) -> Plan:
    """The deepest plan inside the budget; among equals the one with the fewest CPU seconds.

    Args:
        costs: What training costs here.
        workload: What a round asks for.
        budget: What the device leaves over.
        base_mib: Peak of the process that is to train, before it does; by default as in the trials.

    Raises:
        BudgetError: Not even one active block fits; says how much is missing.
    """
    plans = candidates(costs, workload, base_mib)
    fitting = [plan for plan in plans if _fits_memory(plan, budget) and _fits_cpu(plan, budget)]
    if not fitting:
        raise _nothing_fits(plans, budget)
    best = min(fitting, key=lambda plan: (-plan.depth, plan.cpu_s, plan.peak_mib))
    return msgspec.structs.replace(best, bound_by=_bound(plans, best, budget))


def _bound(plans: list[Plan], best: Plan, budget: Budget) -> str:
    """Each limit that alone stands in the way of a deeper plan; both, if only together."""
    deeper = [plan for plan in plans if plan.depth > best.depth]
    if not deeper:
        return "job"
    without_memory = any(_fits_cpu(plan, budget) for plan in deeper)
    without_cpu = any(_fits_memory(plan, budget) for plan in deeper)
    if without_memory == without_cpu:
        return "memory+cpu"
    return "memory" if without_memory else "cpu"


def _fits_memory(plan: Plan, budget: Budget) -> bool:
    return plan.peak_mib * (1 + MEMORY_MARGIN) <= budget.memory_mib


def _fits_cpu(plan: Plan, budget: Budget) -> bool:
    return plan.cpu_s * (1 + CPU_MARGIN) <= budget.cpu_s


def _nothing_fits(plans: list[Plan], budget: Budget) -> BudgetError:
    shallow = [plan for plan in plans if plan.depth == 1]
    small = min(shallow, key=lambda plan: plan.peak_mib)
    quick = min(shallow, key=lambda plan: plan.cpu_s)
    need_mib = small.peak_mib * (1 + MEMORY_MARGIN)
    need_cpu = quick.cpu_s * (1 + CPU_MARGIN)
    if need_mib > budget.memory_mib:
        return BudgetError(
            f"budget: memory: one active block needs {need_mib:.0f} MiB, {need_mib - budget.memory_mib:.0f} MiB more "
            f"than the {budget.memory_mib:.0f} MiB given",
            "raise the memory budget, shorten the samples, or use a smaller backbone",
        )
    if need_cpu > budget.cpu_s:
        return BudgetError(
            f"budget: cpu_s: one active block needs {need_cpu:.2f} CPU seconds a round, "
            f"{need_cpu - budget.cpu_s:.2f} more than the {budget.cpu_s:.2f} given",
            "raise the CPU budget, give the device fewer samples, or lower the local epochs",
        )
    return BudgetError(
        f"budget: no plan fits {budget.memory_mib:.0f} MiB and {budget.cpu_s:.1f} CPU seconds at once: "
        f"the smallest needs {small.cpu_s * (1 + CPU_MARGIN):.1f} s, "
        f"the fastest {quick.peak_mib * (1 + MEMORY_MARGIN):.0f} MiB",
        "raise either of the two",
    )
