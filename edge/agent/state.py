"""What an agent keeps on disk: counters, global tensors that came down, updates that wait to go up."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors, read_exact
from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, MessageError
from fleetune.edge.protocol.files import FolderLock, read_bytes, read_rest, write_atomic
from fleetune.edge.protocol.header import HeaderError, read_header
from fleetune.edge.protocol.messages import (
    MAX_MESSAGE,
    MAX_PAYLOAD,
    Count,
    Name,
    UpdateManifest,
    encode,
)

log = logging.getLogger(__name__)

_KEEP_GLOBALS = 4
"""Global tensors that stay: a broadcast tells only what has changed since the one before."""

_KEEP_RUNS = 4
"""Runs whose private tensors stay: one to use, one that trains, and two to go back to."""


_MAX_NAME = 256
"""Bytes of the file that says whose folder it is."""

_MAX_STRUCT = 4 << 20
"""Bytes of the largest file of JSON: measured costs."""

Kind = TypeVar("Kind", bound=msgspec.Struct)


class RunRecord(msgspec.Struct):
    """What a device did in a run.

    Attributes:
        id: The run.
        answered: Job → newest version that was answered.
    """

    id: Name
    answered: dict[Name, Count] = {}


class Counters(msgspec.Struct):
    """Counts that grow over restarts.

    Attributes:
        boot: Starts of the agent.
        bytes_up: Payload bytes sent, by runs before this one.
        bytes_down: Payload bytes received, by runs before this one.
        runs: The newest runs that this device took part in, oldest first.
        heard: Job → when its newest announcement was issued.
        time: Unix time when this was written, for boards that wake up in the past.
    """

    boot: Count = 0
    bytes_up: Count = 0
    bytes_down: Count = 0
    runs: list[RunRecord] = []
    heard: dict[str, float] = {}
    time: float = 0.0


class State:
    """A folder.

    Args:
        folder: Created if it does not exist.
        device: The id it belongs to; another id in the same folder is an error.

    Raises:
        RunFolderError: Another agent runs in it.
        ConfigError: It belongs to another device, or a file in it is damaged.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self._newest: tuple[str, Tensors] = ("", {})
        self._queued: tuple[str, bytes] = ("", b"")
        self._lock = FolderLock(folder)
        try:
            self._claim(device)
            self.counters = self.read("counters.json", Counters) or Counters()
            self._outbox = self._load_outbox()
            self._acknowledged: set[str] = set()
            for manifest in list(self._outbox.values()):  # a power cut may have come before the counters were written
                if self._known(manifest.run) is None and len(self.counters.runs) >= _KEEP_RUNS:
                    self._let_go(manifest.run)  # or when the run was to be let go
                    continue
                record = self.enter(manifest.run)
                record.answered[manifest.job] = max(manifest.version, record.answered.get(manifest.job, -1))
                heard = self.counters.heard
                heard[manifest.job] = max(manifest.issued, heard.get(manifest.job, 0.0))
                self.counters.time = max(manifest.issued, self.counters.time)
                for count in ("bytes_up", "bytes_down"):
                    if isinstance(value := manifest.metrics.get(count), int):
                        setattr(self.counters, count, max(value, getattr(self.counters, count)))
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Let another agent have the folder."""
        self._lock.close()

    def _claim(self, device: str) -> None:
        owner = self.folder / "device"
        found = read_bytes(owner, _MAX_NAME).decode(errors="replace") if owner.is_file() else device
        if found != device:
            raise ConfigError(
                f"state: {self.folder} belongs to the device {found!r}, not to {device!r}",
                "give every device a state folder of its own",
            )
        write_atomic(owner, device.encode())

    def read(self, name: str, kind: type[Kind]) -> Kind | None:
        """A file of the folder, if it is there.

        Raises:
            ConfigError: It is damaged.
        """
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            return msgspec.json.decode(read_bytes(file, _MAX_STRUCT), type=kind)
        except (OSError, *UNDECODABLE) as error:
            raise ConfigError(f"{file}: {error}", "delete the file; it is made again") from error

    def save(self, name: str, content: msgspec.Struct) -> None:
        """Replace a file of the folder."""
        write_atomic(self.folder / name, encode(content))

    def save_counters(self) -> None:
        """Write the counters."""
        self.save("counters.json", self.counters)

    # --- runs ---------------------------------------------------------------------------------------------------

    def _known(self, run: str) -> RunRecord | None:
        return next((known for known in self.counters.runs if known.id == run), None)

    def answered(self, run: str, job: str) -> int:
        """Newest version of a job that was answered, or -1."""
        known = self._known(run)
        return -1 if known is None else known.answered.get(job, -1)

    def enter(self, run: str) -> RunRecord:
        """The record of a run; a new one takes the place of the oldest, whose tensors and updates are let go.

        Raises:
            OSError: There is no room for the record. Nothing is let go then, and the run is not entered.
        """
        known = self._known(run)
        if known is None:
            known, before = RunRecord(run), self.counters.runs
            runs = [*before, known]
            self.counters.runs = runs[-_KEEP_RUNS:]
            try:
                self.save_counters()
            except OSError:
                self.counters.runs = before
                raise
            for old in runs[:-_KEEP_RUNS]:
                self._let_go(old.id)
        return known

    def _let_go(self, run: str) -> None:
        shutil.rmtree(self.folder / "runs" / run, ignore_errors=True)
        self.drop_updates(run)

    def store(self, run: str, job: str) -> JobStore:
        """The private tensors of a job."""
        return JobStore(self.folder / "runs" / run / job, run, job)

    # --- global tensors that came down --------------------------------------------------------------------------

    def parts(self, job: str) -> Path:
        """Folder of what is on its way down for a job."""
        return self.folder / "parts" / job

    def _globals(self, sha256: str) -> Path:
        return self.folder / "globals" / f"{sha256}.safetensors"

    def has_globals(self, sha256: str) -> bool:
        """Whether the global tensors with this hash are here."""
        return sha256 == self._newest[0] or self._globals(sha256).is_file()

    def load_globals(self, sha256: str | None) -> Tensors:
        """The global tensors with this hash; None are the initial ones, which differ in nothing from themselves.

        Raises:
            MessageError: The file is damaged; it is then gone, and the tensors are asked for again.
        """
        if sha256 is None:
            return {}
        if sha256 == self._newest[0]:
            return dict(self._newest[1])
        file = self._globals(sha256)
        data = file.read_bytes() if file.is_file() and file.stat().st_size <= MAX_PAYLOAD else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            file.unlink(missing_ok=True)
            raise MessageError(f"{file} is damaged", "nothing: it is asked for again", reason="wrong-hash")
        self._touch(file)  # what is still read is not the oldest
        return read_exact(data)

    def save_globals(self, sha256: str, data: bytes, tensors: Tensors, *, on_disk: bool = True) -> None:
        """Keep global tensors, and let go of the oldest ones.

        Args:
            sha256: Hash of ``data``: what a power cut loses is asked for again.
            data: Their bytes.
            tensors: What they are; the next broadcast, most likely, is added to them.
            on_disk: Whether they outlast the process.
        """
        self._newest = sha256, tensors
        if not on_disk:
            return
        write_atomic(self._globals(sha256), data, sync=False)
        self._touch(self._globals(sha256))
        files = sorted(self._globals(sha256).parent.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
        for old in files[:-_KEEP_GLOBALS]:
            old.unlink()

    @staticmethod
    def _touch(file: Path) -> None:
        """Make a file the newest of its folder; many boards wake up in the past."""
        newest = max(other.stat().st_mtime_ns for other in file.parent.glob("*.safetensors"))
        os.utime(file, ns=(newest + 1_000_000, newest + 1_000_000))

    # --- updates that wait to go up -----------------------------------------------------------------------------

    def _load_outbox(self) -> dict[str, UpdateManifest]:
        found = dict[str, UpdateManifest]()
        for file in (self.folder / "outbox").glob("*.update"):
            with file.open("rb") as content:
                try:
                    manifest = msgspec.json.decode(content.readline(MAX_MESSAGE), type=UpdateManifest)
                except UNDECODABLE as error:
                    raise ConfigError(f"{file}: {error}", "delete the file; its round is lost") from error
            if file != self._update(manifest.update):
                raise ConfigError(f"{file} holds the update {manifest.update}", "delete the file; its round is lost")
            found[manifest.update] = manifest
        return found

    def _update(self, update: str) -> Path:
        return self.folder / "outbox" / f"{update}.update"

    def put_outbox(self, manifest: UpdateManifest, data: bytes, lost: bytes = b"") -> None:
        """Keep an update until the next of its job, and at least until the aggregator has it.

        One file, written once: what was sent, that it was sent, and what it lacks cannot contradict each other.

        Args:
            manifest: Of the update: the file's first line.
            data: Its tensors.
            lost: What these lack, for :meth:`lost`.
        """
        write_atomic(self._update(manifest.update), b"".join((encode(manifest), b"\n", data, lost)))
        self._acknowledged.discard(manifest.update)
        for old in self._of_job(manifest.run, manifest.job):
            if old.update in self._acknowledged:
                self._unlink(old.update)
        self._outbox[manifest.update] = manifest
        self._queued = manifest.update, data

    def outbox(self) -> list[UpdateManifest]:
        """Updates that wait, oldest first."""
        waiting = (manifest for update, manifest in self._outbox.items() if update not in self._acknowledged)
        return sorted(waiting, key=lambda manifest: manifest.version)  # many boards have no clock

    def _of_job(self, run: str, job: str) -> list[UpdateManifest]:
        """Updates that are here, oldest first, whether they wait or not."""
        found = (manifest for manifest in self._outbox.values() if (manifest.run, manifest.job) == (run, job))
        return sorted(found, key=lambda manifest: manifest.version)

    def waiting(self, update: str) -> UpdateManifest | None:
        """The manifest of an update, if it waits."""
        return None if update in self._acknowledged else self._outbox.get(update)

    def outbox_data(self, manifest: UpdateManifest) -> bytes | None:
        """The tensors of an update that waits; None if its file is damaged."""
        update, data = self._queued
        if update == manifest.update:  # as long as it is the newest: most are sent at once
            return data
        data = self._read_update(manifest)
        whole = manifest.payload is None or hashlib.sha256(data).hexdigest() == manifest.payload.sha256
        return data if whole else None

    def _read_update(self, manifest: UpdateManifest, *, lost: bool = False) -> bytes:
        """Tensors of an update, or what these lack."""
        size = 0 if manifest.payload is None else manifest.payload.size
        with self._update(manifest.update).open("rb") as file:
            file.readline()
            if not lost:
                return read_rest(file, min(size, MAX_PAYLOAD))
            file.seek(min(size, MAX_PAYLOAD), os.SEEK_CUR)
            return read_rest(file, MAX_PAYLOAD)

    def lost(self, run: str, job: str, *, private: bool = False) -> Tensors:
        """What the newest update of a job lacks; nothing if none is here, or its file is damaged.

        Args:
            run: The run.
            job: The job.
            private: Whether it is to be added to a private update: what one without noise lacks may not leave then.
        """
        for manifest in self._of_job(run, job)[-1:]:
            if private and not manifest.noise:
                return {}
            lost = self._read_update(manifest, lost=True)
            try:
                return read_exact(lost) if lost else {}
            except MessageError as error:
                log.warning("%s: what it lacks is lost: %s", self._update(manifest.update), error)
        return {}

    def acknowledge(self, update: str) -> None:
        """The aggregator has an update. Nothing is written: after a restart it would say so again."""
        self._acknowledged.add(update)
        if self._queued[0] == update:
            self._queued = "", b""

    def drop_outbox(self, update: str) -> None:
        """Let go of an update, if it is there."""
        self._drop([update] if update in self._outbox else [])

    def drop_updates(self, run: str, job: str | None = None) -> None:
        """Let go of all updates of a run, or of one job in it."""
        self._drop([m.update for m in self._outbox.values() if m.run == run and job in (None, m.job)])

    def _drop(self, updates: list[str]) -> None:
        if updates:
            self.save_counters()  # that they were answered must outlast the answers
        for update in updates:
            self._unlink(update)

    def _unlink(self, update: str) -> None:
        self._update(update).unlink(missing_ok=True)
        del self._outbox[update]
        self._acknowledged.discard(update)
        if self._queued[0] == update:
            self._queued = "", b""


class JobStore:
    """A job's private tensors: one safetensors file for each name, in ``folder``."""

    def __init__(self, folder: Path, run: str, job: str) -> None:
        self.folder, self.run, self.job = folder, run, job

    def save(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace what is stored under ``name``, atomically."""
        write_atomic(self.folder / f"{name}.safetensors", safetensors.numpy.save(dict(tensors)))

    def load(self, name: str) -> Tensors | None:
        """What was stored under ``name``, if anything was.

        Raises:
            ConfigError: The file is damaged.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            data = read_bytes(file, MAX_PAYLOAD)
            return {name: slot.array(data) for name, slot in read_header(data).slots.items()}
        except (OSError, HeaderError) as error:
            raise ConfigError(f"{file} is damaged: {error}", "delete the device's state folder") from error
