"""Files that are whole or not there, and folders that belong to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fleetune.edge.protocol.errors import RunFolderError

_PIECE = 1 << 16


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file that may be damaged, or somebody else's: never more memory than ``most`` bytes and one.

    Raises:
        OSError: It cannot be read, or is larger.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe may wait for ever
        raise OSError(errno.EINVAL, "no plain file", str(path))
    with path.open("rb") as file:
        data = read_rest(file, most + 1)
        data += read_pieces(file.read, most + 1 - len(data))  # of what has grown, or has no size
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return data


def read_rest(file: BinaryIO, most: int) -> bytes:
    """What is left of a file, up to so many bytes; Python takes as much memory as is asked for, whatever there is."""
    return file.read(max(0, min(most, os.fstat(file.fileno()).st_size - file.tell())))


def read_pieces(read: Callable[[int], bytes], most: int) -> bytes:
    """What a stream without a size holds, such as one that is decompressed, up to so many bytes.

    Args:
        read: Reads the next bytes, as many as it is asked for or fewer; none at the end.
        most: Bytes.
    """
    pieces, left = list[bytes](), most
    while left and (piece := read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hexadecimal; read in pieces.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """Replace ``path`` with ``data``, so that a reader or a power cut finds the old content or the new one.

    Folders that are missing are made.

    Args:
        path: The file.
        data: Its new content.
        sync: Whether it is on disk before this returns; not needed where a reader checks what it finds, and can do
            without.
        mode: Of the file, less what the umask takes.

    Raises:
        OSError: The file cannot be written; the old one is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def is_full(error: OSError) -> bool:
    """Whether it is room that a disk lacks, which may be there another time."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """Keeps a folder for one process, until it closes the lock or ends in whatever way.

    Args:
        folder: Created, for its owner alone, if it does not exist.
        remedy: What to do where another process has it.

    Raises:
        RunFolderError: Another process holds it.
    """

    def __init__(self, folder: Path, *, remedy: str = "stop that one, or name another folder with --state") -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = (folder / "lock").open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RunFolderError(f"{folder} is in use by another process", remedy) from error

    @property
    def fileno(self) -> int:
        """Its open file: a child that inherits it holds the lock too."""
        return self._file.fileno()

    def close(self) -> None:
        """Let others have the folder."""
        self._file.close()
