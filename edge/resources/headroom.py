"""How much memory this process may still take before somebody is killed for it."""

from __future__ import annotations

import math
import os

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.probes.cgroup import find_group, group_and_above
from fleetune.edge.resources.probes.tree import Tree

RESERVE_MIB = 48.0
"""What is left alone around this process: for the kernel, and for a neighbour that grows during a step."""

_MIB = 1 << 20


class Headroom:
    """The least that the machine and the control groups above this process leave, less a reserve.

    A group that holds nobody else needs no reserve: nobody grows there in the meantime.

    Page cache that was not used lately counts as free, as the kernel takes it back before it kills. Swap does not
    count: training from swap is not training.

    Args:
        tree: Where to read.

    Raises:
        FileAccessError: The kernel does not say how much memory is available.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self._tree = tree or Tree()
        place = find_group(self._tree)
        self._groups = [] if place is None else [(place[0], folder) for folder in group_and_above(*place[1:])]
        self._own = self._groups[0][1] if self._groups else ""
        self.spare_mib()

    def spare_mib(self) -> float:
        """MiB that may be taken now; less than nothing where the reserve is touched or a limit was lowered."""
        available = self._tree.counters("/proc/meminfo").get("MemAvailable")
        if available is None:
            raise FileAccessError(
                "/proc/meminfo does not say how much memory is available", "use Linux 3.14 or newer, with /proc mounted"
            )
        return min([available / 1024 - RESERVE_MIB, *(self._left(*group) for group in self._groups)])

    def _left(self, version: int, folder: str) -> float:
        limit, usage, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        allowed = self._tree.text(f"{folder}/{limit}")
        used = self._tree.text(f"{folder}/{usage}")
        if allowed is None or not allowed.isdecimal() or used is None or not used.isdecimal():
            return math.inf  # no limit here
        cached = self._tree.counters(f"{folder}/memory.stat").get(idle, 0)
        reserve = 0.0 if folder == self._own and self._alone() else RESERVE_MIB
        return (int(allowed) - int(used) + cached) / _MIB - reserve

    def _alone(self) -> bool:
        """Whether this process's group holds nobody else."""
        return (self._tree.text(f"{self._own}/cgroup.procs") or "").split() == [str(os.getpid())]
