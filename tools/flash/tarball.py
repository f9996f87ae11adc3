"""A tree as a tar file whose bytes depend on the tree alone: numeric owners, one time, one order."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import IO

from fleetune.tools.flash.content import EPOCH, walk


def write_tar(root: Path, stream: IO[bytes]) -> None:
    """Write all that lies below ``root``, owned by root, as GNU tar reads it."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path in walk(root):
            entry = archive.gettarinfo(str(path), arcname=path.relative_to(root).as_posix())
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = EPOCH
            if entry.isreg():
                with path.open("rb") as file:
                    archive.addfile(entry, file)
            else:
                archive.addfile(entry)


def write_tar_gz(root: Path, file: Path) -> None:
    """The same, compressed."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=EPOCH) as out,
    ):
        write_tar(root, out)  # type: ignore[arg-type]
