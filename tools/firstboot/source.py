"""Where a seed comes from: a folder that the image was given, or a file system with the label of seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.edge.protocol.files import sync_folder
from fleetune.tools.firstboot.board import Board
from fleetune.tools.firstboot.seed import LABEL, SEED_FILE, TOKEN_FILE
from fleetune.tools.programs import run_program

_DEVICE = Path("dev/disk/by-label") / LABEL
_REMEDY = f"look at the file system with the label {LABEL}"
_MOUNT = Path("run/fleetune/seed")


@contextmanager
def opened(board: Board) -> Iterator[Path | None]:
    """The folder of the seed, as long as the block lasts; None if there is none (any more).

    Raises:
        RunFailedError: The file system with the seed cannot be mounted.
    """
    folder, device = board.state / "seed", board.root / _DEVICE
    if (folder / SEED_FILE).is_file():
        yield folder
    elif device.exists():
        place = board.root / _MOUNT
        place.mkdir(parents=True, exist_ok=True)
        run_program(["mount", "-o", "rw,sync,nosuid,nodev,noexec,umask=0077", device, place], _REMEDY)
        try:
            yield place
        finally:
            run_program(["umount", place], _REMEDY)
    else:
        yield None


def shred(folder: Path) -> bool:
    """Overwrite and remove the token of a seed; False if there is none. It was used: nobody can use it again anyway."""
    file = folder / TOKEN_FILE
    if not file.exists():
        return False
    with file.open("r+b", buffering=0) as stream:
        stream.write(bytes(file.stat().st_size))
        os.fsync(stream.fileno())
    file.unlink()
    sync_folder(folder)
    return True
