"""Memory that is there, and memory that only looks like it: swap on disk, swap that is compressed into memory."""

from __future__ import annotations

import msgspec

from fleetune.edge.resources.probes.tree import Tree, integer, mib


class Memory(msgspec.Struct, frozen=True):
    """A machine's memory in MiB, as `/proc/meminfo`, `/proc/swaps` and `/sys/block/zram*` tell it.

    A Tegra's processor and GPU share one memory. ``available_mib`` is what both can still have: what the GPU takes
    through NvMap is in no process's resident set, and yet gone from here. What firmware has carved out is not in
    ``total_mib``. NvMap also keeps freed pages for later, which count as used although it gives them back under
    pressure, so that ``available_mib`` may be a little low after GPU work.

    Swap is never a budget: on disk it is too slow to train from, and in zram it is memory again.

    Attributes:
        total_mib: Memory that the kernel manages (MemTotal).
        available_mib: What can be had without swapping (MemAvailable, Linux 3.14).
        swap_total_mib: Swap on disk.
        swap_used_mib: How much of it is in use.
        zram_total_mib: Swap on zram, before compression.
        zram_used_mib: How much of it is in use, before compression.
        zram_resident_mib: Memory that zram takes for that, after compression (``mem_used_total`` of ``mm_stat``).
    """

    total_mib: float | None
    available_mib: float | None
    swap_total_mib: float | None
    swap_used_mib: float | None
    zram_total_mib: float | None
    zram_used_mib: float | None
    zram_resident_mib: float | None


def read_memory(tree: Tree) -> Memory:
    """Memory and swap as they are now."""
    meminfo = tree.counters("/proc/meminfo")
    disk, zram = _read_swaps(tree)
    return Memory(
        total_mib=mib(meminfo.get("MemTotal"), 1024),
        available_mib=mib(meminfo.get("MemAvailable"), 1024),
        swap_total_mib=mib(disk[0], 1024) if disk else None,
        swap_used_mib=mib(disk[1], 1024) if disk else None,
        zram_total_mib=mib(zram[0], 1024) if zram else None,
        zram_used_mib=mib(zram[1], 1024) if zram else None,
        zram_resident_mib=_zram_resident_mib(tree),
    )


def _read_swaps(tree: Tree) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Total and used KiB of the swap on disk and of that on zram; None where the kernel has no swap at all."""
    text = tree.text("/proc/swaps")
    if text is None:
        return None, None
    disk, zram = [0, 0], [0, 0]
    for line in text.splitlines()[1:]:
        columns = line.rsplit(maxsplit=4)  # the name may hold spaces: name, type, size, used, priority
        total, used = (integer(column) for column in columns[2:4]) if len(columns) == 5 else (None, None)
        if total is None or used is None:
            tree.skip("/proc/swaps", f"not understood: {line!r}")
            continue
        kind = zram if columns[0].rpartition("/")[2].startswith("zram") else disk
        kind[0] += total
        kind[1] += used
    return (disk[0], disk[1]), (zram[0], zram[1])


def _zram_resident_mib(tree: Tree) -> float | None:
    found = []
    for name in tree.names("/sys/block", "zram[0-9]+"):
        path = f"/sys/block/{name}/mm_stat"
        text = tree.text(path)
        if text is None:
            continue
        columns = text.split()
        used = integer(columns[2]) if len(columns) > 2 else None
        if used is None:
            tree.skip(path, f"not understood: {text!r}")
        else:
            found.append(used)
    return mib(sum(found)) if found else None
