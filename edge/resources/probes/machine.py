"""All that a device can say about itself, in one reading."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fleetune.edge.resources.probes.battery import Battery, read_batteries
from fleetune.edge.resources.probes.cgroup import Cgroup, read_cgroup
from fleetune.edge.resources.probes.clock import Clock, read_clock
from fleetune.edge.resources.probes.disk import Disk, read_disk
from fleetune.edge.resources.probes.memory import Memory, read_memory
from fleetune.edge.resources.probes.power import Power, read_power
from fleetune.edge.resources.probes.pressure import Pressures, read_pressures
from fleetune.edge.resources.probes.processor import Processor, read_processor
from fleetune.edge.resources.probes.tegra import Tegra, read_tegra
from fleetune.edge.resources.probes.thermal import Thermal, read_thermal
from fleetune.edge.resources.probes.tree import Tree


class Machine(msgspec.Struct, frozen=True):
    """A device, as it is now. What it does not have is None or empty; what could not be read is named.

    Attributes:
        board: Its name in the device tree, such as ``NVIDIA Jetson Nano Developer Kit``.
        kernel: Release of its kernel.
        processor: Its processor.
        memory: Its memory.
        cgroup: Limits of the control group that this process is in.
        pressure: How long tasks wait.
        thermal: Heat.
        power: Electrical power.
        batteries: Batteries.
        disk: The disk that holds the folder that was asked for.
        clock: Its clock.
        tegra: What only a Jetson has.
        skipped: What could not be read, and why.
    """

    board: str | None
    kernel: str | None
    processor: Processor
    memory: Memory
    cgroup: Cgroup | None
    pressure: Pressures
    thermal: Thermal
    power: Power
    batteries: tuple[Battery, ...]
    disk: Disk | None
    clock: Clock
    tegra: Tegra | None
    skipped: tuple[str, ...]


def probe(root: Path = Path("/"), *, folder: Path = Path(), write: bool = False, commands: bool = False) -> Machine:
    """Read everything.

    Args:
        root: Where `/proc` and `/sys` are.
        folder: Whose disk is of interest, such as the agent's state.
        write: Whether to measure how fast that disk writes: up to a few seconds.
        commands: Whether to run a Jetson's own programs: about half a second.
    """
    tree = Tree(root)
    board = tree.text("/proc/device-tree/model", 256)
    cgroup = read_cgroup(tree)
    machine = Machine(
        board=board.strip("\0") if board else None,
        kernel=tree.text("/proc/sys/kernel/osrelease", 256),
        processor=read_processor(tree),
        memory=read_memory(tree),
        cgroup=cgroup,
        pressure=read_pressures(tree, cgroup.folder if cgroup and cgroup.version == 2 else None),
        thermal=read_thermal(tree),
        power=read_power(tree),
        batteries=read_batteries(tree),
        disk=read_disk(tree, folder, write=write),
        clock=read_clock(tree),
        tegra=read_tegra(tree, commands=commands),
        skipped=(),
    )
    return msgspec.structs.replace(machine, skipped=tree.skipped)
