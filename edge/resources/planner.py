"""Chooses what a device trains: the deepest plan that stays inside its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.cache import CacheCodec
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.entry import Entry
from fleetune.edge.engine.prefix import CHUNK, split
from fleetune.edge.engine.tokens import CODECS, CodecName
from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.protocol.errors import BudgetError
from fleetune.edge.resources.costs import Costs

MEMORY_MARGIN = 0.1
"""Share of the predicted peak that is kept free, for what the trials did not see."""

CPU_MARGIN = 0.15
"""Share of the predicted CPU seconds that is kept free."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)

CACHES: tuple[CacheCodec, ...] = ("f16", "int8", "none")
"""From the one that a plan prefers, where depths are equal, to the last."""

_MIB = 1 << 20

_EMBEDDING = 0.25
"""What embedding a sample costs, in blocks: measured at 0.06 (MiniLM) and 0.24 (a vision transformer)."""


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device leaves over for training.

    Attributes:
        memory_mib: MiB for the agent's process.
        cpu_s: CPU seconds a round.
        disk_mib: MiB of disk for the prefix cache.
    """

    memory_mib: float
    cpu_s: float
    disk_mib: float = math.inf


class Workload(msgspec.Struct, frozen=True):
    """What a round asks for.

    Attributes:
        train: Training samples.
        evaluate: Samples that are evaluated each round.
        epochs: Passes over the training samples.
        batch: Samples an optimiser step.
        max_depth: Deepest that any device of the job goes.
        length: Mean tokens of a sample.
        longest: Tokens of the longest sample.
        padded: Micro-batch → mean tokens of a sample when each is padded to the longest of its micro-batch.
        blocks: Blocks of the backbone.
        entry_mib: Codec → MiB of one entry of the prefix cache: the hidden states of all samples at one boundary.
        batch_mib: MiB of the hidden states that are there at once when a batch computes its own.
    """

    train: int
    evaluate: int
    epochs: int
    batch: int
    max_depth: int
    length: float
    longest: int
    padded: Mapping[int, float]
    blocks: int
    entry_mib: Mapping[CodecName, float]
    batch_mib: float

    @classmethod
    def of(cls, dataset: Dataset, manifest: Manifest, *, epochs: int, batch: int, max_depth: int) -> Workload:
        """What a round asks of a device with these samples and this pack."""
        lengths = dataset.lengths[dataset.indices("train")]
        width = manifest.width
        entries = {codec: Entry.blank("0" * 64, codec, manifest.blocks, dataset.lengths, width) for codec in CODECS}
        return cls(
            train=len(lengths),
            evaluate=len(dataset.indices("val")) + len(dataset.indices("test")),
            epochs=epochs,
            batch=batch,
            max_depth=max_depth,
            length=float(dataset.lengths.mean()),
            longest=int(dataset.lengths.max()),
            padded={size: padded_length(lengths, batch, size) for size in MICRO_BATCHES if size <= batch},
            blocks=manifest.blocks,
            entry_mib={codec: entry.size / _MIB for codec, entry in entries.items()},
            batch_mib=min(batch, CHUNK) * int(lengths.max()) * width * 4 / _MIB,
        )


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
        bound_by: What keeps it from going deeper: ``memory``, ``cpu``, ``disk``, several of them joined by ``+``, or
            ``job`` at its deepest.
        missing_mib: MiB of disk that the smallest cache lacks; 0 where there is a cache.
    """

    depth: int
    micro_batch: int
    recompute: bool
    cache: CacheCodec
    cache_mib: float
    peak_mib: float
    cpu_s: float
    bound_by: str = ""
    missing_mib: float = 0.0


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
                step = costs.step_cpu_s(depth, workload.train / runs, padded, recompute=recompute)
                train = workload.epochs * runs * step
                evaluate = workload.evaluate * depth * forward
                peak = base + costs.growth_mib(depth, micro_batch, workload.longest, recompute=recompute)
                without = peak + _memory_without_cache(costs, workload, depth, micro_batch, recompute=recompute)
                for cache, mib, tokens in _caches(workload, depth, padded):
                    memory = without if cache == "none" else peak
                    cpu = train + evaluate + tokens * costs.forward_cpu_s
                    found.append(Plan(depth, micro_batch, recompute, cache, mib, memory, cpu))
    return found


def _caches(workload: Workload, depth: int, padded: float) -> Iterator[tuple[CacheCodec, float, float]]:
    """Every cache: its codec, its MiB, and the tokens that go through a frozen block in a round, block by block."""
    once = (workload.train + workload.evaluate) * workload.length
    always = workload.epochs * workload.train * padded + workload.evaluate * workload.length
    between, below = workload.max_depth - depth, _EMBEDDING + workload.blocks - depth
    for codec, mib in workload.entry_mib.items():
        # The blocks between the job's boundary and this device's own carry others' adapters, so they run once a round:
        # from an entry at the job's boundary if there is room for two, else from the samples.
        yield codec, 2 * mib, once * between
        yield codec, mib, once * below if between else 0.0
    yield "none", 0.0, always * below


def _memory_without_cache(costs: Costs, workload: Workload, depth: int, micro_batch: int, *, recompute: bool) -> float:
    """MiB of a batch's hidden states and, beside weights that are held, of one frozen block's."""
    if recompute or depth == workload.blocks:
        return workload.batch_mib
    longest = workload.longest
    held = [costs.growth_mib(active, micro_batch, longest, recompute=False) for active in (depth, depth + 1)]
    return workload.batch_mib + max(0.0, held[1] - held[0])  # with activations, which it has not: rather too much


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
    plans = candidates(costs, workload, base_mib)
    fitting = [plan for plan in plans if all(fits(plan, budget) for fits in _LIMITS.values())]
    if not fitting:
        raise _nothing_fits(plans, budget)
    best = min(fitting, key=lambda plan: (-plan.depth, CACHES.index(plan.cache), plan.cpu_s, plan.peak_mib))
    missing = min(workload.entry_mib.values()) - budget.disk_mib if best.cache == "none" else 0.0
    return msgspec.structs.replace(best, bound_by=_bound(plans, best, budget), missing_mib=missing)


def _fits_memory(plan: Plan, budget: Budget) -> bool:
    return plan.peak_mib * (1 + MEMORY_MARGIN) <= budget.memory_mib


def _fits_cpu(plan: Plan, budget: Budget) -> bool:
    return plan.cpu_s * (1 + CPU_MARGIN) <= budget.cpu_s


def _fits_disk(plan: Plan, budget: Budget) -> bool:
    return plan.cache_mib <= budget.disk_mib


_LIMITS: dict[str, Callable[[Plan, Budget], bool]] = {"memory": _fits_memory, "cpu": _fits_cpu, "disk": _fits_disk}


def _bound(plans: list[Plan], best: Plan, budget: Budget) -> str:
    """Each limit that alone stands in the way of a deeper plan; if none does, those that do together."""
    deeper = [plan for plan in plans if plan.depth > best.depth]
    broken = [{name for name, fits in _LIMITS.items() if not fits(plan, budget)} for plan in deeper]
    fewest = min(map(len, broken), default=0)
    named = set[str]().union(*(names for names in broken if len(names) == fewest))
    return "+".join(name for name in _LIMITS if name in named) or "job"


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
    cached = [plan.cache_mib for plan in shallow if _fits_memory(plan, budget) and _fits_cpu(plan, budget)]
    if cached:
        return BudgetError(
            f"budget: disk: without a prefix cache of {min(cached):.1f} MiB one active block takes more memory or CPU "
            f"seconds than given; that is {min(cached) - budget.disk_mib:.1f} MiB more than the "
            f"{budget.disk_mib:.1f} MiB of disk that there are",
            "raise the disk budget or make room on the disk, or raise the other budgets",
        )
    return BudgetError(
        f"budget: no plan fits {budget.memory_mib:.0f} MiB and {budget.cpu_s:.1f} CPU seconds at once: "
        f"the smallest needs {small.cpu_s * (1 + CPU_MARGIN):.1f} s, "
        f"the fastest {quick.peak_mib * (1 + MEMORY_MARGIN):.0f} MiB",
        "raise either of the two",
    )
