"""The disk that holds a folder: its room, and how fast it really writes."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import msgspec

from fleetune.edge.resources.probes.tree import Tree, reason

RESERVE_MIB = 512
"""What a measurement leaves free, at least; the prefix cache leaves as much."""

_BLOCK_MIB = 2


class Disk(msgspec.Struct, frozen=True):
    """A disk.

    Attributes:
        folder: The folder that was asked for, or the lowest one above it that exists.
        total_mib: Size of its file system.
        free_mib: What this user can still write.
        write_mib_per_s: Measured writing speed; None where it was not measured.
    """

    folder: str
    total_mib: float
    free_mib: float
    write_mib_per_s: float | None


def read_disk(tree: Tree, folder: Path, *, write: bool = False) -> Disk | None:
    """The disk that holds a folder.

    Args:
        tree: Where a folder or a speed that cannot be had is named.
        folder: The folder; need not exist yet. It is one of this machine, whatever the tree's root.
        write: Whether to measure how fast it writes, which may take a few seconds.
    """
    folder = folder.absolute()
    try:
        existing = next(place for place in (folder, *folder.parents) if place.is_dir())
        found = os.statvfs(existing)
    except OSError as error:
        tree.skip(str(folder), reason(error))
        return None
    free_mib = found.f_bavail * found.f_frsize / (1 << 20)
    return Disk(
        folder=str(existing),
        total_mib=found.f_blocks * found.f_frsize / (1 << 20),
        free_mib=free_mib,
        write_mib_per_s=write_speed(tree, existing, free_mib=free_mib) if write else None,
    )


def write_speed(
    tree: Tree,
    folder: Path,
    *,
    free_mib: float,
    size_mib: int = 16,
    at_most_s: float = 3.0,
    reserve_mib: int = RESERVE_MIB,
) -> float | None:
    """MiB a second that reach the disk: a file is written, and waited for, in blocks; None where it was not measured.

    The file has no name (or has lost it before it is written to), so that it is gone however this process ends.

    Args:
        tree: Where it is named why it was not measured.
        folder: Where to write.
        free_mib: What is free there.
        size_mib: How much is written at most.
        at_most_s: No block is begun after so many seconds.
        reserve_mib: Nothing is written if less than this would stay free.
    """
    what = f"{folder}: speed of writing"
    if free_mib - size_mib < reserve_mib:
        tree.skip(what, f"{free_mib:.0f} MiB are free, of which {reserve_mib} stay free, and {size_mib} are needed")
        return None
    block = os.urandom(_BLOCK_MIB << 20)  # a disk that compresses must not gain from it
    written = 0
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.monotonic()
            while written < size_mib << 20 and time.monotonic() - start < at_most_s:
                written += file.write(block)
                os.fsync(file.fileno())
            seconds = time.monotonic() - start
    except OSError as error:
        tree.skip(what, reason(error))
        return None
    return written / (1 << 20) / seconds
