"""A parser with what it may do: refuse by its declared errors, take some memory, write into its own folder."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.edge.protocol.errors import FleetuneError
from fuzz.choices import Choices

MIB = 1 << 20
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - folders of our own in it
"""Where folders are in memory; none where there is no such place."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes from elsewhere.

    Attributes:
        name: Its name.
        make: Makes an input from choices.
        run: Reads an input; may write into a folder that is its own.
        refuses: The errors that it declares.
        memory: Bytes that one input may take at most.
        slow: Whether an input takes more than a millisecond or so.
    """

    name: str
    make: Callable[[Choices], bytes]
    run: Callable[[bytes, Path], None]
    refuses: tuple[type[Exception], ...]
    memory: int = 2 * MIB
    slow: bool = False


class Sandbox:
    """Folders for inputs, in memory where there is such a place, and a watch over everything that is written."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="fleetune-fuzz-", dir=MEMORY))
        self.strays: list[str] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder; whatever is written elsewhere meanwhile is a stray."""
        folder = self._root / "own"
        folder.mkdir()
        _watched.append((os.path.realpath(folder) + os.sep, self.strays))
        try:
            yield folder
        finally:
            _watched.pop()
            shutil.rmtree(folder)


_WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
_watched: list[tuple[str, list[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Sees every file that Python opens to write, makes, moves or removes."""
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = [path] if writes and not isinstance(path, int) else []
    elif event == "sqlite3.connect":
        paths = [] if str(arguments[0]).startswith((":", "file:")) else [arguments[0]]
    elif event in _WRITES:
        shown = arguments[1:] if event in ("os.symlink", "os.link") else arguments  # the first is only named
        paths = [path for path in shown if isinstance(path, str | bytes | os.PathLike)]
    else:
        return
    folder, strays = _watched[-1]
    for path in paths:
        real = os.path.realpath(os.fsdecode(path))
        if not (real + os.sep).startswith(folder) and not real.startswith(("/dev/null", "/proc/self/")):
            strays.append(f"{event} {real}")


sys.addaudithook(_watch)


_MEASURED = 16


def is_measured(entropy: bytes) -> bool:
    """Whether memory is measured, which takes several times as long: of one input in sixteen, always the same ones."""
    return zlib.crc32(entropy) % _MEASURED == 0


def check(target: Target, entropy: bytes, sandbox: Sandbox, *, measure: bool = True) -> str:
    """Read one input.

    Args:
        target: Who reads.
        entropy: What the input is made from.
        sandbox: Where it may write.
        measure: Whether to measure memory; with a limit on the whole process that is not needed.

    Returns:
        The name of the error that it was refused by; empty if it was taken.

    Raises:
        AssertionError: It took too much memory, wrote elsewhere, or refused without a remedy.
        Exception: It failed by an error that it does not declare.
    """
    data, refused, peak = target.make(Choices(entropy)), "", 0
    with sandbox.folder() as folder:
        if measure:
            tracemalloc.start()
        try:
            target.run(data, folder)
        except target.refuses as error:
            refused = type(error).__name__
            assert not isinstance(error, FleetuneError) or error.remedy
        finally:
            if measure:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
    assert peak <= target.memory, f"{target.name}: {peak} bytes for an input of {len(data)}"
    assert not sandbox.strays, sandbox.strays
    return refused
