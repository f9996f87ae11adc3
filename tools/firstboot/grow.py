"""The root file system grows to what its disk holds: an image is as small as its content."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fleetune.tools.programs import run_program

_REMEDY = "see journalctl -u fleetune-firstboot"
_GROWFS = ("usr/lib/systemd/systemd-growfs", "lib/systemd/systemd-growfs")


def grow_root(root: Path) -> str:
    """Grow partition and file system; doing it again changes nothing.

    Returns:
        What was done, for the log.

    Raises:
        RunFailedError: A program that is there failed.
    """
    device = root.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return "the root file system is on no disk of its own"
    name = block.resolve().name
    number, told = block / "partition", []
    if number.exists():
        disk = block.resolve().parent.name
        growpart = shutil.which("growpart")
        if growpart is None:
            return f"{name} stays as it is: growpart is not here (cloud-guest-utils)"
        # 1: it has no room to grow into
        run_program([growpart, f"/dev/{disk}", number.read_text(encoding="ascii").strip()], _REMEDY, fine=(0, 1))
        told.append(f"partition {name}")
    program = next((str(root / path) for path in _GROWFS if (root / path).exists()), None)
    if program is None:
        return "the file system stays as it is: systemd-growfs is not here"
    run_program([program, "/"], _REMEDY)
    return " and ".join([*told, f"the file system on {name}"])
