"""The aggregator's memory: an append-only file of records, and the tensors they speak of.

A record is on disk before anything that follows from it happens: an update is journaled before it is acknowledged,
a round before it is announced. A restarted aggregator goes on where the last record ends.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import EXACT, Codec, Tensors, read_exact
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.errors import UNDECODABLE, MessageError, RunFolderError
from fleetune.edge.protocol.files import FolderLock, make_folder, read_bytes, read_rest, sync_folder, write_atomic
from fleetune.edge.protocol.messages import MAX_PAYLOAD, Announcement, Count, Name, Reason, Time, UpdateManifest
from fleetune.edge.protocol.modelfile import FILE as MODEL_FILE
from fleetune.edge.protocol.modelfile import GLOBAL, Card, write_model_file
from fleetune.server.job import Job
from fleetune.server.privacy import FILE as PRIVACY_FILE
from fleetune.server.privacy import Guarantee, RoundPrivacy

log = logging.getLogger(__name__)

FILE = "journal.jsonl"

_MAX_RECORD = 4 << 20
"""Bytes of the longest record: that of a run's begin names every tensor of every job."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A run began: what its first announcement fixed for all that follow."""

    run: Name
    fleet: Name
    jobs: tuple[Job, ...]


class Announced(msgspec.Struct, frozen=True, tag="announced"):
    """A round was announced."""

    announcement: Announcement


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """An update was accepted.

    Attributes:
        manifest: What the device announced.
        received: Unix time.
        into: Version of the round that it counts in: its own, or, if it came late, a later one.
        staleness: Rounds that were closed between the two.
        norm: L2 norm over all values of its tensors; 0 if it has none.
        start: Where its payload begins in the file of the round's payloads.
    """

    manifest: UpdateManifest
    received: Time
    into: Count
    staleness: Count = 0
    norm: float = 0.0
    start: Count = 0


class Typical(msgspec.Struct, frozen=True):
    """What was typical of the updates of a round: the bounds of the next one follow from it.

    Attributes:
        norm: Median of their norms.
        samples: Median of the samples that their devices claim.
    """

    norm: float
    samples: int


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """A round was aggregated; the global tensors lie beside the journal.

    Attributes:
        job: The job.
        version: Of its announcement.
        devices: Who answered it.
        late: Answers to earlier rounds that were folded in.
        closed: Unix time.
        means: Mean of every figure over the devices that answered it.
        typical: What was typical of the updates that it took in; absent if none changed anything.
        privacy: What its sums hide behind, if updates were private.
    """

    job: Name
    version: Count
    devices: list[Name]
    closed: Time
    late: Count = 0
    means: dict[str, float] = {}
    typical: Typical | None = None
    privacy: RoundPrivacy | None = None


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """A job has no more rounds."""

    job: Name


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An update was refused for cause: what no good device sends.

    Attributes:
        device: Who sent it.
        reason: Why.
        at: Unix time.
    """

    device: Name
    reason: Reason
    at: Time


class Quarantined(msgspec.Struct, frozen=True, tag="quarantined"):
    """A device is kept out of the run from here on.

    Attributes:
        device: Who.
        reason: Why its last update was refused.
        at: Unix time.
    """

    device: Name
    reason: Reason
    at: Time


class Readmitted(msgspec.Struct, frozen=True, tag="readmitted"):
    """The operator has let a device in again; what was refused before does not count."""

    device: Name
    at: Time


Record = Started | Announced | Accepted | Closed | Finished | Refused | Quarantined | Readmitted


class Journal:
    """Records in a folder, and tensors beside them.

    Args:
        folder: Created if it does not exist.
        keep_history: Whether every round's updates and global tensors stay, to study a run.

    Raises:
        RunFolderError: Another process has it open. A last record that was cut off is dropped.
    """

    def __init__(self, folder: Path, *, keep_history: bool = False) -> None:
        self.folder, self._keep_history = folder, keep_history
        self._lock = FolderLock(folder)
        self.path = folder / FILE
        try:
            self._drop_torn_record()
            self._file = self.path.open("ab")
        except OSError:
            self._lock.close()
            raise
        sync_folder(folder)

    def _drop_torn_record(self) -> None:
        if not self.path.is_file():
            return
        whole = size = self.path.stat().st_size
        with self.path.open("rb") as file:
            while whole:
                start = max(0, whole - (1 << 16))
                file.seek(start)
                end = file.read(whole - start).rfind(b"\n")
                whole = start + end + 1
                if end >= 0:
                    break
        if whole < size:
            log.warning("%s: the last record was cut off and is dropped", self.path)
            os.truncate(self.path, whole)

    def close(self) -> None:
        """Close the file, and let others open it."""
        self._file.close()
        self._lock.close()

    # --- records ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self.path.stat().st_size

    def append(self, *records: Record, sync: bool = True) -> None:
        """Write records and wait until they are on disk.

        Args:
            records: What happened.
            sync: Whether to wait; not needed for what means nothing until the next record is there.

        Raises:
            OSError: They cannot be written; then none of them is.
        """
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        self._append(self._file.fileno(), lines, sync=sync)

    @staticmethod
    def _append(descriptor: int, data: bytes, *, sync: bool = True) -> None:
        size = os.fstat(descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def started(self) -> Started | None:
        """How the run began, if it did."""
        first = next(read_records(self.path), None) if self.path.is_file() else None
        return first if isinstance(first, Started) else None

    # --- updates ------------------------------------------------------------------------------------------------

    def accept(self, updates: Iterable[tuple[Accepted, bytes]]) -> list[Accepted]:
        """Keep updates of one round: their payloads, then their records; on disk when it returns.

        Raises:
            OSError: There is no room; then none of them is kept.
        """
        accepted, payloads = list[Accepted](), list[bytes]()
        updates = list(updates)
        path = self._payloads(updates[0][0].manifest.job, updates[0][0].into)
        if any(data for _, data in updates):
            make_folder(path.parent)
        start = size = path.stat().st_size if path.exists() else 0
        for record, data in updates:
            accepted.append(msgspec.structs.replace(record, start=start))
            payloads.append(data)
            start += len(data)
        if any(payloads):
            fresh = not path.exists()
            with path.open("ab") as file:
                self._append(file.fileno(), b"".join(payloads))
            if fresh:
                sync_folder(path.parent)
        try:
            self.append(*accepted)
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise
        return accepted

    def load_update(self, record: Accepted, shapes: Shapes) -> Tensors:
        """What an update of a round that is open, or whose history is kept, adds to the global tensors.

        Args:
            record: The update's.
            shapes: Name → shape of every tensor of its job.

        Raises:
            RunFolderError: The file is damaged.
        """
        payload = record.manifest.payload
        if payload is None:
            return {}
        path = self._payloads(record.manifest.job, record.into)
        with path.open("rb") as file:
            file.seek(record.start)
            data = read_rest(file, min(payload.size, MAX_PAYLOAD))
        try:
            return Codec.named(payload.codec).decode(data, shapes)
        except MessageError as error:
            raise RunFolderError(
                f"{path}: the update at byte {record.start} is damaged: {error.what}",
                "restore the file from a backup, or start the run in a new folder",
            ) from error

    def _payloads(self, job: str, version: int) -> Path:
        return self.folder / job / "updates" / f"{version}.bin"

    # --- global tensors -----------------------------------------------------------------------------------------

    def save_checkpoint(self, job: str, version: int, data: bytes) -> None:
        """Keep what followed from all rounds up to this one, whose ``closed`` record is on disk; let go of the rounds.

        Raises:
            OSError: There is no room; then all stays as it was.
        """
        folder = self.folder / job
        write_atomic(folder / "checkpoints" / f"{version}.safetensors", data)
        for number, file in _numbered(folder / "checkpoints", ".safetensors"):
            if number < version:
                file.unlink()
        for number, file in _numbered(folder / "updates", ".bin"):
            if number <= version and not self._keep_history:
                file.unlink()

    def load_checkpoint(self, job: str, most: int) -> tuple[int, bytes]:
        """The newest checkpoint of at most so many bytes, and the round that it includes; -1 and nothing without one.

        Raises:
            OSError: It cannot be read, or is larger.
        """
        number, file = max(_numbered(self.folder / job / "checkpoints", ".safetensors"), default=(-1, None))
        return number, b"" if file is None else read_bytes(file, most)

    def uncheckpointed(self, job: str, version: int) -> int:
        """Bytes of the updates of rounds after this one."""
        files = _numbered(self.folder / job / "updates", ".bin")
        return sum(file.stat().st_size for number, file in files if number > version)

    def keep_globals(self, job: str, version: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep the global tensors after a round, if the history is kept."""
        if self._keep_history:
            write_atomic(self._globals(job, version), EXACT.encode(tensors), sync=False)

    def load_globals(self, job: str, version: int) -> Tensors:
        """The global tensors after a round, less the initial ones, if the history was kept."""
        return read_exact(read_bytes(self._globals(job, version), MAX_PAYLOAD))

    def _globals(self, job: str, version: int) -> Path:
        return self.folder / job / "globals" / f"{version}.safetensors"

    def save_model(self, job: str, card: Card, expert: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace the model file of a job by its newest global expert."""
        write_model_file(self.model_path(job), card, {f"{GLOBAL}{name}": tensor for name, tensor in expert.items()})

    def save_guarantee(self, job: str, guarantee: Guarantee) -> None:
        """Replace what is said of the privacy that a job's devices had."""
        write_atomic(self.privacy_path(job), msgspec.json.format(msgspec.json.encode(guarantee)), sync=False)

    def privacy_path(self, job: str) -> Path:
        """Where that is."""
        return self.folder / job / PRIVACY_FILE

    def model_path(self, job: str) -> Path:
        """Where a job's global expert is, to take home."""
        return self.folder / job / MODEL_FILE

    def parts(self, job: str) -> Path:
        """Folder of what is on its way up."""
        return self.folder / job / "parts"


def _numbered(folder: Path, ending: str) -> Iterator[tuple[int, Path]]:
    """Files of a folder that are called by a number, and nothing else that may lie there."""
    for file in folder.glob(f"*{ending}"):
        if re.fullmatch(r"[0-9]{1,16}", stem := file.name.removesuffix(ending)):
            yield int(stem), file


def read_records(path: Path, start: int = 0) -> Iterator[Record]:
    """Read a journal, from a byte on, without opening it for writing.

    Raises:
        RunFolderError: A record is damaged, or longer than any can be.
    """
    with path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(iter(lambda: file.readline(_MAX_RECORD + 1), b""), start=1):
            try:
                if len(line) > _MAX_RECORD:
                    raise msgspec.DecodeError(f"the record is longer than {_MAX_RECORD} bytes")
                yield msgspec.json.decode(line, type=Record)
            except UNDECODABLE as error:
                where = f"line {number}" if start == 0 else f"line {number} after byte {start}"
                raise RunFolderError(
                    f"{path}, {where}: {str(error)[:200]}",
                    "restore the file from a backup, or start the run in a new folder",
                ) from error
