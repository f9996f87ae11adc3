"""Chooses what a device trains: the deepest plan that stays inside its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from fleetune.edge.engine.cache import CacheCodec
from fleetune.edge.protocol.errors import BudgetError
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.limits import LIMITS, Budget, lacking
from fleetune.edge.resources.workload import Workload

CACHES: tuple[CacheCodec, ...] = ("f16", "int8", "none")
"""From the one that a plan prefers, where depths are equal, to the last."""

_EMBEDDING = 0.25
"""What embedding a sample costs, in blocks: measured at 0.06 (MiniLM) and 0.24 (a vision transformer)."""


class Plan(msgspec.Struct, frozen=True):
    """What the device does.

    Attributes:
        depth: Active blocks, from the head.
        micro_batch: Samples that go through a block at once.
        recompute: Whether activations are recomputed.
        cache: How the prefix cache stores hidden states; ``none``: the frozen blocks run for each batch.
        cache_mib: MiB of disk that the cache may take.
        peak_mib: Predicted peak of the process, without margin.
        cpu_s: Predicted CPU seconds of a round, without margin.
        seconds: Predicted seconds of a round, without margin.
        joules: Predicted energy of a round; None without a sensor.
        bound_by: What keeps it from going deeper: names of limits, several of them joined by ``+``, or ``job`` at its
            deepest.
        missing_mib: MiB of disk that the smallest cache lacks; 0 where there is a cache.
    """

    depth: int
    micro_batch: int
    recompute: bool
    cache: CacheCodec
    cache_mib: float
    peak_mib: float
    cpu_s: float
    seconds: float
    joules: float | None
    bound_by: str = ""
    missing_mib: float = 0.0


def candidates(costs: Costs, workload: Workload, base_mib: float | None = None) -> list[Plan]:
    """Every plan that the job allows and the trials cover, with its predicted costs.

    Args:
        costs: What training costs here.
        workload: What a round asks for.
        base_mib: Peak of the process that is to train, before it does; by default as in the trials.
    """
    model = costs.model
    base = model.base_mib if base_mib is None else base_mib
    found = []
    for depth in range(1, workload.max_depth + 1):
        for micro_batch, padded in workload.padded.items():
            for recompute in (False, True):
                if not costs.covers(depth, micro_batch, workload.longest, recompute=recompute):
                    continue
                full, rest = divmod(workload.train, workload.batch)
                runs = full * math.ceil(workload.batch / micro_batch) + math.ceil(rest / micro_batch)
                step, step_cpu = model.step_s(depth, workload.train / runs, padded, recompute=recompute)
                peak = base + model.growth_mib(depth, micro_batch, workload.longest, recompute=recompute)
                without = peak + _memory_without_cache(costs, workload, depth, micro_batch, recompute=recompute)
                for cache, mib, sorted_, shuffled in _caches(workload, depth):
                    seconds, cpu = (
                        workload.epochs * runs * a_step + one + other
                        for a_step, one, other in zip(
                            (step, step_cpu),
                            model.forward_s(workload.evaluate * depth + sorted_, micro_batch, workload.length),
                            model.forward_s(shuffled, micro_batch, padded),
                            strict=True,
                        )
                    )
                    memory = without if cache == "none" else peak
                    joules = None if model.watts is None else model.watts * seconds
                    found.append(Plan(depth, micro_batch, recompute, cache, mib, memory, cpu, seconds, joules))
    return found


def _caches(workload: Workload, depth: int) -> Iterator[tuple[CacheCodec, float, float, float]]:
    """Every cache: its codec, its MiB, and how often a sample goes through a frozen block in a round, block by block:
    among samples of like length, and among those of a batch.
    """
    once = workload.train + workload.evaluate
    between, below = workload.max_depth - depth, _EMBEDDING + workload.blocks - depth
    for codec, mib in workload.entry_mib.items():
        # The blocks between the job's boundary and this device's own carry others' adapters, so they run once a round:
        # from an entry at the job's boundary if there is room for two, else from the samples.
        yield codec, 2 * mib, once * between, 0.0
        yield codec, mib, once * below if between else 0.0, 0.0
    yield "none", 0.0, workload.evaluate * below, workload.epochs * workload.train * below


def _memory_without_cache(costs: Costs, workload: Workload, depth: int, micro_batch: int, *, recompute: bool) -> float:
    """MiB of a batch's hidden states and, beside weights that are held, of one frozen block's."""
    if recompute or depth == workload.blocks:
        return workload.batch_mib
    longest = workload.longest
    held = [costs.model.growth_mib(active, micro_batch, longest, recompute=False) for active in (depth, depth + 1)]
    return workload.batch_mib + max(0.0, held[1] - held[0])  # with activations, which it has not: rather too much


@dataclass(frozen=True)
class Option:
    """A plan beside a budget.

    Attributes:
        plan: The plan.
        lacks: Limit → how much of it the plan lacks, margin included; empty if the plan fits.
    """

    plan: Plan
    lacks: dict[str, float]


def options(costs: Costs, workload: Workload, budget: Budget, base_mib: float | None = None) -> list[Option]:
    """Every plan that the job allows, the best first: what fits, the deepest, the preferred cache, the least time.

    Raises:
        BudgetError: The budget limits energy, and the trials had no sensor for it.
    """
    if budget.joules < math.inf and costs.model.watts is None:
        raise BudgetError(
            f"budget: energy: {budget.joules:g} joules are given, but no sensor of this device measures energy",
            "leave the limit out, and limit CPU seconds instead",
        )
    found = [Option(plan, lacking(plan, budget)) for plan in candidates(costs, workload, base_mib)]
    return sorted(found, key=_rank)


def _rank(option: Option) -> tuple[object, ...]:
    plan = option.plan
    return (len(option.lacks), -plan.depth, CACHES.index(plan.cache), plan.cpu_s, plan.peak_mib)


def choose(costs: Costs, workload: Workload, budget: Budget, base_mib: float | None = None) -> Plan:
    """The deepest plan inside the budget; among equals the preferred cache, then the fewest CPU seconds.

    Args:
        costs: What training costs here.
        workload: What a round asks for.
        budget: What the device leaves over.
        base_mib: Peak of the process that is to train, before it does; by default as in the trials.

    Raises:
        BudgetError: Not even one active block fits; says how much is missing.
    """
    found = options(costs, workload, budget, base_mib)
    best = found[0]
    if best.lacks:
        raise _nothing_fits(found, budget)
    missing = min(workload.entry_mib.values()) - budget.disk_mib if best.plan.cache == "none" else 0.0
    return msgspec.structs.replace(best.plan, bound_by=_bound(found, best.plan), missing_mib=missing)


def _bound(found: list[Option], best: Plan) -> str:
    """Each limit that alone stands in the way of a deeper plan; if none does, those that do together."""
    deeper = [option.lacks.keys() for option in found if option.plan.depth > best.depth]
    fewest = min(map(len, deeper), default=0)
    named = set[str]().union(*(lacks for lacks in deeper if len(lacks) == fewest))
    return "+".join(limit.name for limit in LIMITS if limit.name in named) or "job"


def _nothing_fits(found: list[Option], budget: Budget) -> BudgetError:
    for limit in LIMITS:
        if limit.name != "disk" and all(limit.name in option.lacks for option in found):
            # Deeper plans may take less time: the blocks between the job's deepest and a device's own run once a round.
            plan = min((option.plan for option in found), key=lambda one: (round(limit.need(one), 2), one.depth))
            need, given = limit.need(plan), limit.given(budget)
            who = "one active block needs" if plan.depth == 1 else f"depth {plan.depth}, which takes least, needs"
            return BudgetError(
                f"budget: {limit.name}: {who} {limit.amount(need)}, {limit.amount(need - given)} more "
                f"than the {limit.amount(given)} given",
                limit.remedy,
            )
    shallow = [option for option in found if option.plan.depth == 1]
    cached = [option.plan.cache_mib for option in shallow if option.lacks.keys() <= {"disk"}]
    if cached:
        return BudgetError(
            f"budget: disk: without a prefix cache of {min(cached):.1f} MiB one active block takes more memory or time "
            f"than given; that is {min(cached) - budget.disk_mib:.1f} MiB more than the "
            f"{budget.disk_mib:.1f} MiB of disk that there are",
            "raise the disk budget or make room on the disk, or raise the other budgets",
        )
    lacking = {name for option in shallow for name in option.lacks}
    limits = [limit for limit in LIMITS if limit.name in lacking]
    least = (
        f"the least {limit.name} takes " + " and ".join(other.amount(other.need(plan)) for other in limits)
        for limit in limits
        for plan in [min((option.plan for option in shallow), key=limit.need)]
    )
    return BudgetError(
        f"budget: no plan fits {' and '.join(limit.amount(limit.given(budget)) for limit in limits)} at once: "
        + "; ".join(least),
        "raise either of them",
    )
