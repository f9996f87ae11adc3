"""Where a seed comes from: a folder that the image was given, or a file system with the label of seeds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import sync_folder
from fleetune.tools.firstboot.board import Board
from fleetune.tools.firstboot.seed import LABEL, SEED_FILE, TOKEN_FILE

_DEVICE = Path("dev/disk/by-label") / LABEL
_MOUNT = Path("run/fleetune/seed")


@contextmanager
def opened(board: Board) -> Iterator[Path | None]:
    """The folder of the seed, as long as the block lasts; None if there is none (any more).

    Raises:
        ConfigError: The file system with the seed cannot be mounted.
    """
    folder, device = board.state / "seed", board.root / _DEVICE
    if (folder / SEED_FILE).is_file():
        yield folder
    elif device.exists():
        place = board.root / _MOUNT
        place.mkdir(parents=True, exist_ok=True)
        _run("mount", "-o", "rw,sync,nosuid,nodev,noexec,umask=0077", str(device), str(place))
        try:
            yield place
        finally:
            _run("umount", str(place))
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


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"{command[0]} {command[-1]}: {done.stderr.strip()}", f"look at the file system with the label {LABEL}"
        )
