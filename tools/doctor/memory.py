"""Memory that training can have, and what happens when there is none left."""

from __future__ import annotations

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.headroom import RESERVE_MIB, Headroom
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup
from fleetune.edge.resources.probes.machine import Machine
from fleetune.edge.resources.probes.memory import Memory
from fleetune.edge.resources.probes.tree import Tree
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.notes import Note, noted

MEMORY = 35
"""Exit code of the check."""

MINIMUM_MIB = 128
"""What must be left for training: a process that trains the top blocks of MiniLM takes 115 to 155 MiB."""

_TRIAL_MIB = 16.0


def check_memory(machine: Machine, tree: Tree) -> Check:
    """Whether a training process has room.

    Args:
        machine: What its probes say.
        tree: Where the kernel's files are.
    """
    try:
        left = Headroom(tree).spare_mib()
    except FileAccessError as error:
        return Check("memory", "failure", error.what, error.remedy, MEMORY)
    memory = machine.memory
    limit = machine.cgroup.limit_mib if machine.cgroup else None
    total, available = memory.total_mib or 0.0, memory.available_mib or 0.0
    found = f"{max(0.0, left):.0f} MiB can be had of {total:.0f} ({available:.0f} available"
    found += ", no limit by a control group)" if limit is None else f", {limit:.0f} the control group's limit)"
    if left >= MINIMUM_MIB:
        return noted("memory", found, [*_swap(memory), *_when_it_ends(tree), *_confinement(tree)])
    return Check(
        "memory",
        "failure",
        f"{found}: too little for training, which takes about {MINIMUM_MIB} MiB",
        "raise the control group's limit (systemd: MemoryMax=, Docker: --memory)"
        if available - RESERVE_MIB >= MINIMUM_MIB
        else "stop other programs, such as the desktop: sudo systemctl set-default multi-user.target",
        MEMORY,
    )


def _swap(memory: Memory) -> list[Note]:
    kinds = (("of swap on disk", memory.swap_total_mib), ("of swap in zram", memory.zram_total_mib))
    sizes = [f"{size:.0f} MiB {kind}" for kind, size in kinds if size]
    return [Note(f"{' and '.join(sizes)}, which no budget counts")] if sizes else []


def _when_it_ends(tree: Tree) -> list[Note]:
    notes = []
    if tree.integer("/proc/sys/vm/overcommit_memory") == 2:
        notes.append(
            Note(
                "the kernel refuses memory beyond its commit limit (vm.overcommit_memory 2), so that training may end "
                "while memory is free",
                "sudo sysctl vm.overcommit_memory=0",
            )
        )
    if tree.integer("/proc/sys/vm/panic_on_oom"):
        notes.append(Note("the kernel panics when memory ends (vm.panic_on_oom)", "sudo sysctl vm.panic_on_oom=0"))
    if tree.integer("/proc/self/oom_score_adj") == -1000:
        notes.append(
            Note(
                "the kernel would kill every other process before this one (oom_score_adj -1000)",
                "start the agent without OOMScoreAdjust=-1000",
            )
        )
    return notes


def _confinement(tree: Tree) -> list[Note]:
    try:
        LimitedGroup(_TRIAL_MIB, tree=tree).close()
    except FileAccessError as error:
        words = f"trials run under a limit of their own, as a control group is not to be had: {error.what}"
        return [Note(words, error.remedy)]
    return []
