"""What was done to which board: one line as each begins and one as it ends, so that a run goes on where it stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, FileAccessError
from fleetune.edge.protocol.files import FolderLock, read_bytes, sync_folder
from fleetune.edge.protocol.messages import Name, Sha256

FILE = "ledger.jsonl"

_MAX = 64 << 20
_AGAIN = "make room, and give the same command again"

State = Literal["open", "done", "failed", "interrupted"]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A board began to be flashed, or ended.

    Attributes:
        device: Its id.
        serial: Its serial number, where the inventory has one.
        where: The USB port, or the card.
        image: SHA-256 of what it is flashed with.
        at: Unix time.
        log: Name of the file in ``logs`` with what the programs said.
        code: Exit status; absent as it begins.
    """

    device: Name
    serial: str | None
    where: str
    image: Sha256
    at: Annotated[float, msgspec.Meta(ge=0)]
    log: str
    code: int | None = None


class Ledger:
    """One of them; nobody else writes to it as long as it is open.

    Args:
        folder: Made if it is not there.

    Raises:
        RunFolderError: Another run writes to it.
        ConfigError: It is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(folder, remedy="wait until that run, and what it has started, is over")
        self.folder = folder
        (folder / "logs").mkdir(exist_ok=True)
        self._entries = list(read_ledger(folder))
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, read_bytes(folder / FILE, _MAX).rfind(b"\n") + 1)  # a line that a power cut tore
        sync_folder(folder)

    def state(self, device: str, image: str) -> State:
        """Where a device stands with an image."""
        return state_of(self._entries, device, image)

    def begin(self, device: str, serial: str | None, where: str, image: str) -> Path:
        """A device begins; returns the file for what the programs say."""
        log = f"{device}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.log"
        self._add(Entry(device, serial, where, image, time.time(), log))
        return self.folder / "logs" / log

    def end(self, device: str, code: int) -> None:
        """It has ended."""
        began = next(entry for entry in reversed(self._entries) if entry.device == device)
        self._add(msgspec.structs.replace(began, at=time.time(), code=code))

    @property
    def held(self) -> int:
        """The lock's file: whoever inherits it keeps others out, also when this process is killed."""
        return self._lock.fileno

    def close(self) -> None:
        """Let others write."""
        os.close(self._file)
        self._lock.close()

    def _add(self, entry: Entry) -> None:
        line, end = msgspec.json.encode(entry) + b"\n", os.fstat(self._file).st_size
        try:
            whole = os.write(self._file, line) == len(line)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise FileAccessError(f"{self.folder / FILE}: {error.strerror}", _AGAIN) from error
        if not whole:
            os.ftruncate(self._file, end)
            raise FileAccessError(f"{self.folder / FILE}: no room for a line", _AGAIN)
        self._entries.append(entry)


def read_ledger(folder: Path) -> Iterator[Entry]:
    """Its entries; a line without an end counts for nothing, since a power cut tore it.

    Raises:
        ConfigError: It is damaged.
    """
    file = folder / FILE
    try:
        lines = read_bytes(file, _MAX).split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield msgspec.json.decode(line, type=Entry)
        except UNDECODABLE as error:
            raise ConfigError(
                f"{file}, line {number}: {error}", "take that line out, or name another --ledger"
            ) from error


def state_of(entries: list[Entry], device: str, image: str) -> State:
    """Where a device stands with an image: its last entry says it."""
    last = next((entry for entry in reversed(entries) if entry.device == device), None)
    if last is None or last.image != image:
        return "open"
    if last.code is None:
        return "interrupted"
    return "done" if last.code == 0 else "failed"
