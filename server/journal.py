"""The aggregator's memory: an append-only file of records, and the tensors they speak of.

A record is on disk before anything that follows from it happens: an update is journaled before it is acknowledged,
a round before it is announced. A restarted aggregator reads the records and goes on where the last one ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import UNDECODABLE, RunFolderError
from fleetune.edge.protocol.files import FolderLock, sync_folder, write_atomic
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.edge.protocol.modelfile import FILE as MODEL_FILE
from fleetune.edge.protocol.modelfile import GLOBAL, Card, write_model_file
from fleetune.server.job import Job

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
Tensors = dict[str, NDArray[np.float32]]


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A run began: what its first announcement fixed for all that follow."""

    run: str
    fleet: str
    jobs: tuple[Job, ...]


class Announced(msgspec.Struct, frozen=True, tag="announced"):
    """A round was announced."""

    announcement: Announcement


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """An update was accepted; its payload lies beside the journal."""

    manifest: UpdateManifest
    received: float


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """A round was aggregated; the global tensors lie beside the journal."""

    job: str
    version: int
    devices: list[str]
    closed: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """A job has no more rounds."""

    job: str


Record = Started | Announced | Accepted | Closed | Finished


class Journal:
    """Records in a folder.

    Args:
        folder: Created if it does not exist.

    Raises:
        RunFolderError: Another process has it open, or a record in the middle of the file is damaged. A last record
            that was cut off is dropped.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FolderLock(folder)
        self._path = folder / FILE
        try:
            self.records = self._recover()
            self._file = self._path.open("ab")
        except (RunFolderError, OSError):
            self._lock.close()
            raise
        sync_folder(folder)

    def _recover(self) -> list[Record]:
        if not self._path.is_file():
            return []
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            log.warning("%s: the last record was cut off and is dropped", self._path)
            os.truncate(self._path, len(whole))
        return read_records(self._path)

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on disk."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Close the file, and let others open it."""
        self._file.close()
        self._lock.close()

    # --- what the records say -----------------------------------------------------------------------------------

    @property
    def started(self) -> Started | None:
        """How the run began, if it did."""
        return next((record for record in self.records if isinstance(record, Started)), None)

    # --- tensors beside the records -----------------------------------------------------------------------------

    def save_update(self, manifest: UpdateManifest, data: bytes) -> None:
        """Keep the payload of an update; call before its record is appended."""
        write_atomic(self._update_path(manifest), data)

    def load_update(self, manifest: UpdateManifest) -> Tensors:
        """The tensors of a journaled update."""
        if manifest.payload is None:
            return {}
        return Codec.named(manifest.payload.codec).decode(self._update_path(manifest).read_bytes())

    def _update_path(self, manifest: UpdateManifest) -> Path:
        return self._folder / manifest.job / "updates" / str(manifest.version) / f"{manifest.device}.bin"

    def save_globals(self, job: str, version: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep the global tensors after a round; call before its ``closed`` record is appended."""
        write_atomic(self.globals_path(job, version), Codec.named("f32").encode(tensors))

    def load_globals(self, job: str, version: int) -> Tensors:
        """The global tensors after a round."""
        return Codec.named("f32").decode(self.globals_path(job, version).read_bytes())

    def globals_path(self, job: str, version: int) -> Path:
        """Where the global tensors after a round are kept."""
        return self._folder / job / "globals" / f"{version}.safetensors"

    def save_model(self, job: str, card: Card, expert: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace the model file of a job by its newest global expert."""
        write_model_file(self.model_path(job), card, {f"{GLOBAL}{name}": tensor for name, tensor in expert.items()})

    def model_path(self, job: str) -> Path:
        """Where a job's global expert is, to take home."""
        return self._folder / job / MODEL_FILE

    def save_broadcast(self, job: str, version: int, data: bytes) -> None:
        """Keep what was broadcast, to repair late devices from."""
        write_atomic(self._folder / job / "broadcasts" / f"{version}.bin", data)

    def load_broadcast(self, job: str, version: int) -> bytes | None:
        """What was broadcast, if that version exists."""
        file = self._folder / job / "broadcasts" / f"{version}.bin"
        return file.read_bytes() if file.is_file() else None


def read_records(path: Path) -> list[Record]:
    """Read a journal without opening it for writing.

    Raises:
        RunFolderError: A record is damaged.
    """
    records: list[Record] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(msgspec.json.decode(line, type=Record))
            except UNDECODABLE as error:
                raise RunFolderError(
                    f"{path}, line {number}: {error}",
                    "restore the file from a backup, or start the run in a new folder",
                ) from error
    return records
