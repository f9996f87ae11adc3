"""What the processor may use now: a power mode switches cores off and caps their clock, and costs change with it."""

from __future__ import annotations

import os

from fleetune.edge.resources.probes.tree import Tree

POWER_MODE = r"^[1-9][0-9]{0,4} cores?(, [0-9]{1,6} MHz)?\Z"
"""What :func:`read_power_mode` says, and nothing else."""

_FOLDER = "/sys/devices/system/cpu"


def read_power_mode(tree: Tree | None = None) -> str:
    """Cores that this process may use, and the highest clock that the system allows, such as ``4 cores, 1479 MHz``.

    It is read where every board has it, `nvpmodel` being only one of those who set it. Without a clock that can be
    changed, as in most virtual machines, there are only the cores.
    """
    tree = tree or Tree()
    cores = len(os.sched_getaffinity(0))
    names = tree.names(_FOLDER, "cpu[0-9]+")
    clocks = [tree.integer(f"{_FOLDER}/{name}/cpufreq/scaling_max_freq") for name in names]
    highest = max((clock for clock in clocks if clock is not None), default=None)
    count = f"{cores} core{'s' if cores > 1 else ''}"
    return count if highest is None else f"{count}, {highest / 1000:.0f} MHz"


def cores_of(power_mode: str) -> int:
    """Cores of a power mode."""
    return int(power_mode.partition(" ")[0])
