"""The memory that a control group allows a process, whichever version of control groups, in a container or not."""

from __future__ import annotations

import posixpath
import re
from typing import Literal

import msgspec

from fleetune.edge.resources.probes.tree import Tree, integer, mib

_UNLIMITED = 1 << 62  # version 1 says LONG_MAX, rounded down to its page size, where there is no limit
_MOUNTS_LIMIT = 1 << 20
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Events(msgspec.Struct, frozen=True):
    """How often a group met its limits, since it was made.

    Attributes:
        oom: Allocations that failed, or were about to (version 2).
        oom_kill: Processes that the kernel killed for memory (version 1: Linux 4.17).
        high: How often processes were slowed down at ``high_mib`` (version 2).
        max: How often the limit was met (version 2); met and not relieved at once (version 1: ``failcnt``).
    """

    oom: int | None
    oom_kill: int | None
    high: int | None
    max: int | None


class Cgroup(msgspec.Struct, frozen=True):
    """The group that accounts for a process's memory, page cache included.

    Attributes:
        version: Version of control groups whose memory controller is in use.
        folder: The group's folder on the device.
        limit_mib: Smallest limit of the group and those above it that can be seen; None without one.
        high_mib: Smallest amount above which processes are slowed down (version 2); None without one.
        swap_limit_mib: Smallest limit of swap, zram included; None without one.
        usage_mib: What the group uses now.
        peak_mib: The most that it has used (version 2: Linux 5.19).
        events: How often it met its limits.
    """

    version: Literal[1, 2]
    folder: str
    limit_mib: float | None
    high_mib: float | None
    swap_limit_mib: float | None
    usage_mib: float | None
    peak_mib: float | None
    events: Events


def read_cgroup(tree: Tree, process: int | Literal["self"] = "self") -> Cgroup | None:
    """The group of a process; None where no group accounts for memory, as on a Raspberry Pi's standard kernel.

    Args:
        tree: Where to read.
        process: Its number.
    """
    place = find_group(tree, process)
    if place is None:
        return None
    return read_group(tree, *place)


def read_group(tree: Tree, version: Literal[1, 2], mount: str, folder: str) -> Cgroup:
    """A group and the limits above it, up to the mount point."""
    return _read_version_2(tree, mount, folder) if version == 2 else _read_version_1(tree, mount, folder)


def find_group(tree: Tree, process: int | Literal["self"] = "self") -> tuple[Literal[1, 2], str, str] | None:
    """Version, mount point and folder of the group that accounts for a process's memory; None without one."""
    path = f"/proc/{process}/cgroup"
    groups = {}
    for line in (tree.text(path) or "").splitlines():
        columns = line.split(":", 2)
        if len(columns) == 3 and columns[2].startswith("/"):
            groups.update(dict.fromkeys(columns[1].split(","), columns[2]))
        else:
            tree.skip(path, f"not understood: {line!r}")
    mounts = _mounts(tree)
    if "memory" in groups and "memory" in mounts:
        return (1, *_folder(tree, mounts["memory"], groups["memory"]))
    if "" in groups and "" in mounts:
        mount, folder = _folder(tree, mounts[""], groups[""])
        # Beside version 1, or where the kernel's command line disables it, version 2 has no memory controller.
        if "memory" in (tree.text(f"{mount}/cgroup.controllers") or "").split():
            while folder != mount and not tree.has(f"{folder}/memory.current"):
                folder = folder.rpartition("/")[0]  # a group without the controller is accounted for above it
            return 2, mount, folder
    return None


def _mounts(tree: Tree) -> dict[str, tuple[str, str]]:
    """Mount point and mounted root of version 1's memory controller (``memory``) and of version 2 (empty)."""
    found: dict[str, tuple[str, str]] = {}
    for line in (tree.text("/proc/self/mountinfo", _MOUNTS_LIMIT) or "").splitlines():
        before, _, after = line.partition(" - ")
        columns, kind = before.split(" "), after.split(" ")
        if len(columns) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        mounted, point = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), column) for column in columns[3:5])
        if kind[0] == "cgroup2":
            found.setdefault("", (point, mounted))
        elif "memory" in kind[-1].split(","):
            found.setdefault("memory", (point, mounted))
    return found


def _folder(tree: Tree, mount: tuple[str, str], group: str) -> tuple[str, str]:
    """Mount point and folder of a group: in a container, the lowest group above it that can be seen."""
    point, mounted = mount
    below = posixpath.relpath(group, mounted) if mounted.startswith("/") else "."
    parts = [] if below.startswith("..") or below == "." else below.split("/")
    while parts and not tree.has("/".join([point, *parts])):
        parts.pop()
    return point, "/".join([point, *parts])


def group_and_above(mount: str, folder: str) -> list[str]:
    """The group's folder and those above it, up to the mount point."""
    found = [folder]
    while found[-1] != mount:
        found.append(found[-1].rpartition("/")[0])
    return found


def _limit(tree: Tree, path: str) -> int | None:
    text = tree.text(path)
    if text is None or text == "max":
        return None
    value = integer(text)
    if value is None:
        tree.skip(path, f"not a number: {text!r}")
    return value if value is not None and value < _UNLIMITED else None


def _smallest(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _read_version_2(tree: Tree, mount: str, folder: str) -> Cgroup:
    groups = group_and_above(mount, folder)
    events = tree.counters(f"{folder}/memory.events")
    return Cgroup(
        version=2,
        folder=folder,
        limit_mib=mib(_smallest([_limit(tree, f"{group}/memory.max") for group in groups])),
        high_mib=mib(_smallest([_limit(tree, f"{group}/memory.high") for group in groups])),
        swap_limit_mib=mib(_smallest([_limit(tree, f"{group}/memory.swap.max") for group in groups])),
        usage_mib=mib(tree.integer(f"{folder}/memory.current")),
        peak_mib=mib(tree.integer(f"{folder}/memory.peak")),
        events=Events(*(events.get(name) for name in ("oom", "oom_kill", "high", "max"))),
    )


def _read_version_1(tree: Tree, mount: str, folder: str) -> Cgroup:
    groups = group_and_above(mount, folder)
    limits = [_limit(tree, f"{group}/memory.limit_in_bytes") for group in groups]
    both = [_limit(tree, f"{group}/memory.memsw.limit_in_bytes") for group in groups]
    stat = tree.counters(f"{folder}/memory.stat")  # knows of limits above what a container sees
    limits += [_bounded(stat.get("hierarchical_memory_limit"))]
    both += [_bounded(stat.get("hierarchical_memsw_limit"))]
    memory_and_swap = _smallest(both)
    limit = _smallest([*limits, memory_and_swap])
    swap = None if memory_and_swap is None or limit is None else memory_and_swap - limit
    return Cgroup(
        version=1,
        folder=folder,
        limit_mib=mib(limit),
        high_mib=None,
        swap_limit_mib=mib(swap),
        usage_mib=mib(tree.integer(f"{folder}/memory.usage_in_bytes")),
        peak_mib=mib(tree.integer(f"{folder}/memory.max_usage_in_bytes")),
        events=Events(
            oom=None,
            oom_kill=tree.counters(f"{folder}/memory.oom_control").get("oom_kill"),
            high=None,
            max=tree.integer(f"{folder}/memory.failcnt"),
        ),
    )


def _bounded(value: int | None) -> int | None:
    return value if value is not None and value < _UNLIMITED else None
