"""Files for an ext4 file system that is not mounted: an image, or a card in its reader. ``debugfs`` writes them."""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.programs import find_program, run_program


def put_files(disk: Path, files: Mapping[str, Path], *, offset: int = 0) -> None:
    """Put files into a file system, in place of those that are there; they belong to root, and keep their mode.

    Args:
        disk: An image, or a device.
        files: Path in the file system → file. Folders that are missing are made.
        offset: Where the file system begins, in bytes.

    Raises:
        ConfigError: ``debugfs`` is missing.
        RunFailedError: There is no file system, or it has no room.
    """
    program, remedy = find_program("debugfs", "e2fsprogs"), f"see that {disk} holds an ext4 file system with room"
    place = f"{disk}?offset={offset}" if offset else str(disk)
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if parent.name}
    lines = [f'mkdir "{folder}"' for folder in sorted(folders)]
    for path, file in files.items():
        lines += [f'rm "{path}"', f'write "{file.resolve()}" "{path}"']
    with tempfile.TemporaryDirectory() as scratch:
        script, back = Path(scratch, "script"), Path(scratch, "back")
        script.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        run_program([program, "-w", "-f", script, place], remedy)
        for path, file in files.items():  # it ends well whatever became of its commands
            back.unlink(missing_ok=True)
            run_program([program, "-R", f'dump "{path}" {back}', place], remedy)
            if not back.is_file() or not filecmp.cmp(back, file, shallow=False):
                raise RunFailedError(f"{path} could not be put into {disk}", remedy)
