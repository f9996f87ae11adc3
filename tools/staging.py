"""Atomic writes into a folder.

A folder is filled under a temporary name beside its place and renamed when it is complete, so no reader ever
sees half of one. Whoever fills a staging folder holds a lock on it. The kernel drops that lock when the
process dies, however it dies; so the next process can tell a staging folder in use from an abandoned one,
which it removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".staging-"
_LOCK = ".lock"


@contextlib.contextmanager
def staged(root: Path) -> Iterator[Path]:
    """Yields an empty folder inside `root` that is gone when the block ends, whatever happens in it.

    Args:
        root: Folder to stage in, on the same file system as the final place; made if it is missing.

    Raises:
        OSError: `root` cannot be written to, or its file system has no locks.
    """
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        held = _lock(folder / _LOCK, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keeps other processes out of the same block for the same `root`: they wait.

    Raises:
        OSError: `root` cannot be written to, or its file system has no locks.
    """
    held = _lock(root / _LOCK, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(held)


def fill(folder: Path, target: Path) -> None:
    """Moves the files of `folder` to `target`, all at once, or one by one those that `target` lacks.

    When two processes fill the same target, the later one leaves the files of the earlier one as they are.

    Args:
        folder: A complete folder; what is in it is moved away.
        target: Its final place, on the same file system.

    Raises:
        OSError: The target cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        folder.rename(target)
        return
    for source in sorted(folder.rglob("*")):
        place = target / source.relative_to(folder)
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            source.replace(place)


def _lock(path: Path, how: int) -> int:
    """Opens and locks `path`, and returns its descriptor; closing that unlocks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(root: Path) -> None:
    """Removes staging folders whose process is dead; call it while `root` is locked."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            held = _lock(folder / _LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or just removed by its owner
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
