"""What an agent keeps on disk: counters, global tensors that came down, updates that wait to go up."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Codec, Tensors
from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, MessageError
from fleetune.edge.protocol.files import FolderLock, write_atomic
from fleetune.edge.protocol.messages import UpdateManifest, encode

_KEEP_GLOBALS = 4
"""Global tensors that stay: a broadcast tells only what has changed since the one before."""

_KEEP_RUNS = 4
"""Runs whose private tensors stay: one to use, one that trains, and two to go back to."""


Kind = TypeVar("Kind", bound=msgspec.Struct)


class RunRecord(msgspec.Struct):
    """What a device did in a run.

    Attributes:
        id: The run.
        answered: Job → newest version that was answered.
    """

    id: str
    answered: dict[str, int] = {}


class Counters(msgspec.Struct):
    """Counts that grow over restarts.

    Attributes:
        boot: Starts of the agent.
        bytes_up: Payload bytes sent, by runs before this one.
        bytes_down: Payload bytes received, by runs before this one.
        runs: The newest runs that this device took part in, oldest first.
    """

    boot: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    runs: list[RunRecord] = []


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
            for manifest in self._outbox.values():  # a power cut may have come before the counters were written
                record = self.enter(manifest.run)
                record.answered[manifest.job] = max(manifest.version, record.answered.get(manifest.job, -1))
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Let another agent have the folder."""
        self._lock.close()

    def _claim(self, device: str) -> None:
        owner = self.folder / "device"
        if owner.is_file() and owner.read_text() != device:
            raise ConfigError(
                f"state: {self.folder} belongs to the device {owner.read_text()!r}, not to {device!r}",
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
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except UNDECODABLE as error:
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
        """The record of a run; a new one takes the place of the oldest, whose tensors and updates are let go."""
        known = self._known(run)
        if known is None:
            known = RunRecord(run)
            runs = [*self.counters.runs, known]
            self.counters.runs, gone = runs[-_KEEP_RUNS:], [some.id for some in runs[:-_KEEP_RUNS]]
            self.save_counters()
            for old in gone:
                shutil.rmtree(self.folder / "runs" / old, ignore_errors=True)
                for manifest in self.outbox():
                    if manifest.run == old:
                        self.drop_outbox(manifest.update)
        return known

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
        return self._globals(sha256).is_file()

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
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            file.unlink(missing_ok=True)
            raise MessageError(f"{file} is damaged", "nothing: it is asked for again", reason="wrong-hash")
        self._touch(file)  # what is still read is not the oldest
        return Codec.named("f32").decode(data)

    def save_globals(self, sha256: str, data: bytes, tensors: Tensors) -> None:
        """Keep global tensors, and let go of the oldest ones.

        Args:
            sha256: Hash of ``data``: what a power cut loses is asked for again.
            data: Their bytes.
            tensors: What they are; the next broadcast, most likely, is added to them.
        """
        write_atomic(self._globals(sha256), data, sync=False)
        self._newest = sha256, tensors
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
                    manifest = msgspec.json.decode(content.readline(), type=UpdateManifest)
                except UNDECODABLE as error:
                    raise ConfigError(f"{file}: {error}", "delete the file; its round is lost") from error
            found[manifest.update] = manifest
        return found

    def _update(self, update: str) -> Path:
        return self.folder / "outbox" / f"{update}.update"

    def put_outbox(self, manifest: UpdateManifest, data: bytes) -> None:
        """Keep an update until the aggregator has it: a line with its manifest, then its tensors."""
        write_atomic(self._update(manifest.update), encode(manifest) + b"\n" + data)
        self._outbox[manifest.update] = manifest
        self._queued = manifest.update, data

    def outbox(self) -> list[UpdateManifest]:
        """Updates that wait, oldest first."""
        return sorted(self._outbox.values(), key=lambda manifest: manifest.version)  # many boards have no clock

    def waiting(self, update: str) -> UpdateManifest | None:
        """The manifest of an update, if it waits."""
        return self._outbox.get(update)

    def outbox_data(self, manifest: UpdateManifest) -> bytes | None:
        """The tensors of an update that waits; None if its file is damaged."""
        update, data = self._queued
        if update == manifest.update:  # as long as it is the newest: most are sent at once
            return data
        with self._update(manifest.update).open("rb") as file:
            file.readline()
            data = file.read()
        whole = manifest.payload is None or hashlib.sha256(data).hexdigest() == manifest.payload.sha256
        return data if whole else None

    def drop_outbox(self, update: str) -> UpdateManifest | None:
        """Let go of an update and return it, if it was there."""
        manifest = self._outbox.pop(update, None)
        if manifest is not None:
            self.save_counters()  # that it was answered must outlast the answer
            self._update(update).unlink(missing_ok=True)
            if self._queued[0] == update:
                self._queued = "", b""
        return manifest


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
            tensors: Tensors = safetensors.numpy.load(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{file} is damaged: {error}", "delete the device's state folder") from error
        return tensors
