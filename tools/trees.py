"""Trees of files: their digest, and archives whose bytes depend on the tree alone."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fleetune.edge.protocol.errors import SignatureError
from fleetune.edge.protocol.files import file_sha256

MAX_BYTES, MAX_FILES = 4 << 30, 200_000
"""Of what an archive may unpack to."""

_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError)
_LONGEST, _LONGEST_PART = 1000, 255

SHORT = 12
"""Digits of its digest that a tree is called by."""

EPOCH = 1767225600
"""Unix time of every file, 2026-01-01: two builds of the same content are the same bytes."""


def walk(root: Path) -> Iterator[Path]:
    """All that lies below a folder, folders before what they hold, by name; links are not followed."""
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)


def tree_digest(root: Path) -> str:
    """SHA-256 of a tree: of its names, modes, links and bytes."""
    digest = hashlib.sha256()
    for path in walk(root):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            digest.update(f"link {name}\0{path.readlink()}\n".encode())
        elif path.is_dir():
            digest.update(f"folder {name}\n".encode())
        else:
            digest.update(f"file {path.stat().st_mode & 0o777:o} {name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def set_modes(root: Path) -> None:
    """Everybody may read; programs may be run, and nothing else."""
    for path in walk(root):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent == root / "usr/bin" else 0o644)


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


def write_tar_gz(root: Path, file: Path, *, level: int = 6) -> None:
    """The same, compressed; at level 1 it is soon done, and larger."""
    with (
        file.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=EPOCH) as out,
    ):
        write_tar(root, out)  # type: ignore[arg-type]


def extract(archive: Path, tree: Path, *, below: str = "") -> None:
    """Unpack an archive that may come from anybody: files, folders and links, never outside of the tree.

    Args:
        archive: A compressed tar file.
        tree: An empty folder; it is made if it is missing.
        below: Only what lies below this folder of the archive, without its name.

    Raises:
        SignatureError: It is no archive, unpacks to too much, or leads out of the tree.
        OSError: There is no room.
    """
    inside, size, folders = f"{below.rstrip('/')}/" if below else "", 0, {tree}
    tree.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as source:
            for number, entry in enumerate(source):
                size += entry.size
                if number >= MAX_FILES or size > MAX_BYTES:
                    raise SignatureError(f"{archive} unpacks to too much", "make a smaller one")
                if entry.name.startswith(inside):
                    _extract(source, entry, entry.name.removeprefix(inside), tree, folders)
    except (*_DAMAGE, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SignatureError(f"{archive}: {error}", "get it again from where it is from") from error
    for folder in folders:
        folder.chmod(0o755)


def _extract(source: tarfile.TarFile, entry: tarfile.TarInfo, name: str, tree: Path, folders: set[Path]) -> None:
    place, parts = tree / name, Path(name).parts
    longest = max((len(os.fsencode(part)) for part in parts), default=0)
    if max(len(os.fsencode(name)), len(os.fsencode(entry.linkname))) > _LONGEST or longest > _LONGEST_PART:
        raise tarfile.TarError(f"{name[:80]!r}… is too long")
    if name.startswith("/") or ".." in parts or not parts:
        raise tarfile.TarError(f"{entry.name!r} leads out of it")
    _make_folder(place if entry.isdir() else place.parent, folders)
    if entry.isdir():
        return
    if entry.issym():
        place.symlink_to(entry.linkname)
    elif entry.isreg():
        stream = source.extractfile(entry)
        assert stream is not None
        with stream, place.open("xb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        place.chmod(0o755 if entry.mode & 0o100 else 0o644)
    else:
        raise tarfile.TarError(f"{entry.name!r} is neither file, folder nor link")


def _make_folder(folder: Path, made: set[Path]) -> None:
    """Make a folder, and those that it lies in.

    A link may lead out of the tree, as a kit's does to the system's Python; what is written may not.
    """
    if folder in made:
        return
    _make_folder(folder.parent, made)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise tarfile.TarError(f"{folder.name!r} is a link or a file, and has something in it") from error
    made.add(folder)
