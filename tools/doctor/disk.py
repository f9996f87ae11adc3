"""The disk of the state folder: whether it can be written, its room, its speed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fleetune.edge.resources.probes.disk import RESERVE_MIB, Disk
from fleetune.edge.resources.probes.tree import reason
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.notes import Note, noted

DISK = 36
"""Exit code of the check."""

MINIMUM_MIB = 64
"""What the state itself may take: broadcasts, the outbox and models of a few jobs."""

SLOW_MIB_PER_S = 5.0
"""Below it, writing the prefix cache of a few hundred samples takes longer than computing it."""

_BLOCK = 1 << 16


def check_disk(folder: Path, disk: Disk | None) -> Check:
    """Whether an agent can keep its state there.

    Args:
        folder: The state folder, which need not exist yet.
        disk: What its probe says; None where it could not be read.
    """
    if folder.exists() and not folder.is_dir():
        return Check("disk", "failure", f"{folder} is not a folder", "name a folder with --state", DISK)
    if disk is None:
        return Check("disk", "failure", f"{folder} cannot be read", "see what was not read, or name another", DISK)
    place = (
        disk.folder if Path(disk.folder) == folder.absolute() else f"{disk.folder}, where {folder.name} would be made"
    )
    try:
        _write(Path(disk.folder))
    except OSError as error:
        return Check(
            "disk",
            "failure",
            f"{place}: cannot be written: {reason(error)}",
            "name a writable folder with --state; a disk that turned read-only needs fsck, or is worn out",
            DISK,
        )
    speed = "" if disk.write_mib_per_s is None else f", written at {disk.write_mib_per_s:.0f} MiB/s"
    found = f"{place}: {disk.free_mib:.0f} of {disk.total_mib:.0f} MiB free{speed}"
    if disk.free_mib < MINIMUM_MIB:
        return Check(
            "disk",
            "failure",
            f"{found}; an agent's state takes up to {MINIMUM_MIB} MiB",
            "make room, or name a folder on another disk with --state",
            DISK,
        )
    notes = []
    if disk.free_mib < RESERVE_MIB:
        notes.append(
            Note(
                f"no prefix cache, which leaves {RESERVE_MIB} MiB free: the frozen blocks run for every batch",
                "make room, or name a folder on another disk with --state",
            )
        )
    if disk.write_mib_per_s is not None and disk.write_mib_per_s < SLOW_MIB_PER_S:
        notes.append(Note("slow to write", "use a faster card, or a disk on USB or NVMe"))
    return noted("disk", found, notes)


def _write(folder: Path) -> None:
    """Write as an agent does: a small file that reaches the disk, and is gone afterwards."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(_BLOCK))
        os.fsync(file.fileno())
