"""Watches memory while training: this process's own limit, what is left around it, and how long tasks wait for it."""

from __future__ import annotations

from fleetune.edge.resources.headroom import Headroom
from fleetune.edge.resources.probes.cgroup import find_group
from fleetune.edge.resources.probes.pressure import PressureGauge
from fleetune.edge.resources.probes.tree import Tree
from fleetune.edge.resources.process import resident_mib

WAITING = 0.2
"""Share of the time in which tasks wait for memory, above which this process gives some back."""

_STEP_MIB = 16.0
"""What it gives back then: how much is missing, nobody knows."""


class MemoryWatch:
    """Says how much memory this process should give back.

    Args:
        limit_mib: Its own limit, as the budget gives it.
        tree: Where the kernel's files are.
    """

    def __init__(self, limit_mib: float, tree: Tree | None = None) -> None:
        tree = tree or Tree()
        group = find_group(tree)
        self._limit = limit_mib
        self._headroom = Headroom(tree)
        self._gauge = PressureGauge(tree, group[2] if group and group[0] == 2 else None)

    def excess_mib(self) -> float:
        """MiB that this process has too many; 0 or less if all is well."""
        over = max(resident_mib() - self._limit, -self._headroom.spare_mib())
        pressure = self._gauge.read()
        waits = pressure is not None and pressure.some_share > WAITING
        return max(over, _STEP_MIB) if waits else over

    def afforded_mib(self) -> float:
        """MiB that this process may have in all, as things are now."""
        return resident_mib() + self._headroom.spare_mib()

    def close(self) -> None:
        """Let go of the kernel's files."""
        self._gauge.close()
