"""How much memory this process may still take before somebody is killed for it."""

from __future__ import annotations

import math

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.probes.cgroup import find_group, group_and_above
from fleetune.edge.resources.probes.tree import Tree

_MIB = 1 << 20


class Headroom:
    """The least that the machine and the control groups above this process leave.

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
        self.read_mib()

    def read_mib(self) -> float:
        """MiB that are left now; less than nothing where a limit was lowered."""
        available = self._tree.counters("/proc/meminfo").get("MemAvailable")
        if available is None:
            raise FileAccessError(
                "/proc/meminfo does not say how much memory is available", "use Linux 3.14 or newer, with /proc mounted"
            )
        return min(available / 1024, min((self._left(*group) for group in self._groups), default=math.inf))

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
        return (int(allowed) - int(used) + cached) / _MIB
