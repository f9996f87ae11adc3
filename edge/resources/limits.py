"""What a device leaves over for training, and whether a plan stays inside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from fleetune.edge.resources.planner import Plan

MEMORY_MARGIN = 0.1
"""Share of the predicted peak that is kept free, for what the trials did not see."""

TIME_MARGIN = 0.15
"""Share of the predicted seconds, CPU seconds and joules that is kept free."""


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device leaves over for training.

    Attributes:
        memory_mib: MiB for the agent's process.
        cpu_s: CPU seconds a round.
        disk_mib: MiB of disk for the prefix cache.
        deadline_s: Seconds a round.
        joules: Energy a round.
    """

    memory_mib: float
    cpu_s: float = math.inf
    disk_mib: float = math.inf
    deadline_s: float = math.inf
    joules: float = math.inf


@dataclass(frozen=True)
class Limit:
    """One of a budget's limits.

    Attributes:
        name: What is limited.
        unit: Its unit.
        digits: Digits after the point that people want to see.
        margin: Share of what is predicted that is kept free.
        used: How much of it a plan uses.
        given: How much of it a budget gives.
        remedy: What to do when nothing fits.
    """

    name: str
    unit: str
    digits: int
    margin: float
    used: Callable[[Plan], float]
    given: Callable[[Budget], float]
    remedy: str

    def need(self, plan: Plan) -> float:
        """What a plan uses, margin included."""
        return self.used(plan) * (1 + self.margin)

    def amount(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.{self.digits}f} {self.unit}"


LIMITS = (
    Limit(
        "memory",
        "MiB",
        0,
        MEMORY_MARGIN,
        lambda plan: plan.peak_mib,
        lambda budget: budget.memory_mib,
        "raise the memory budget, shorten the samples, or use a smaller backbone",
    ),
    Limit(
        "cpu",
        "CPU seconds a round",
        2,
        TIME_MARGIN,
        lambda plan: plan.cpu_s,
        lambda budget: budget.cpu_s,
        "raise the CPU budget, give the device fewer samples, or lower the local epochs or the job's --max-depth",
    ),
    Limit(
        "time",
        "seconds a round",
        2,
        TIME_MARGIN,
        lambda plan: plan.seconds,
        lambda budget: budget.deadline_s,
        "raise the deadline, give the device fewer samples, or lower the local epochs or the job's --max-depth",
    ),
    Limit(
        "energy",
        "joules a round",
        1,
        TIME_MARGIN,
        lambda plan: plan.joules or 0.0,
        lambda budget: budget.joules,
        "raise the energy budget, give the device fewer samples, or lower the local epochs or the job's --max-depth",
    ),
    Limit(
        "disk",
        "MiB of disk",
        1,
        0.0,
        lambda plan: plan.cache_mib,
        lambda budget: budget.disk_mib,
        "raise the disk budget or make room on the disk",
    ),
)
"""In the order in which they are named."""


def lacking(plan: Plan, budget: Budget) -> dict[str, float]:
    """Limit → how much of it a plan lacks, margin included; empty if the plan fits."""
    lacks = {limit.name: limit.need(plan) - limit.given(budget) for limit in LIMITS}
    return {name: amount for name, amount in lacks.items() if amount > 0}
