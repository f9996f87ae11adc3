"""What an agent keeps on disk: counters, costs, payloads that came down, updates that wait to go up."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.methods.base import Tensors
from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError
from fleetune.edge.protocol.files import FolderLock, write_atomic
from fleetune.edge.protocol.messages import Payload, UpdateManifest, encode
from fleetune.edge.resources.costs import Costs

_KEEP_PAYLOADS = 4

_KEEP_RUNS = 4
"""Runs whose private tensors stay: one to use, one that trains, and two to go back to."""


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
        self._lock = FolderLock(folder)
        try:
            self._claim(device)
            self.counters: Counters = self._read("counters.json", Counters) or Counters()
            self._outbox = self._load_outbox()
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

    def _read(self, name: str, kind: type[Any]) -> Any:
        file = self.folder / name
        if not file.is_file():
            return None
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except UNDECODABLE as error:
            raise ConfigError(f"{file}: {error}", "delete the file; it is made again") from error

    def save_counters(self) -> None:
        """Write the counters."""
        write_atomic(self.folder / "counters.json", encode(self.counters))

    # --- what was measured and decided --------------------------------------------------------------------------

    def costs(self) -> Costs | None:
        """The measured costs, if there are any."""
        costs: Costs | None = self._read("costs.json", Costs)
        return costs

    def save_costs(self, costs: Costs) -> None:
        """Keep measured costs."""
        write_atomic(self.folder / "costs.json", encode(costs))

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
            runs, known = self.counters.runs, RunRecord(run)
            runs[:] = [*runs, known][-_KEEP_RUNS:]
            self.save_counters()
            kept = {some.id for some in runs}
            for folder in (self.folder / "runs").glob("*"):
                if folder.name not in kept:
                    shutil.rmtree(folder)
            for manifest in self.outbox():
                if manifest.run not in kept:
                    self.drop_outbox(manifest.update)
        return known

    def store(self, run: str, job: str) -> JobStore:
        """The private tensors of a job."""
        return JobStore(self.folder / "runs" / run / job, run, job)

    # --- payloads that came down --------------------------------------------------------------------------------

    def payload(self, payload: Payload) -> bytes | None:
        """The bytes of a payload, if they are here and whole."""
        file = self.folder / "payloads" / payload.sha256
        if not file.is_file() or file.stat().st_size != payload.size:
            return None
        data = file.read_bytes()
        os.utime(file)  # what is still read is not the oldest
        return data if hashlib.sha256(data).hexdigest() == payload.sha256 else None

    def save_payload(self, payload: Payload, data: bytes) -> None:
        """Keep a payload, and let go of the oldest ones."""
        folder = self.folder / "payloads"
        write_atomic(folder / payload.sha256, data)
        files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in files[_KEEP_PAYLOADS:]:
            old.unlink()

    # --- updates that wait to go up -----------------------------------------------------------------------------

    def _load_outbox(self) -> dict[str, UpdateManifest]:
        files = (self.folder / "outbox").glob("*.json")
        found: list[UpdateManifest] = [self._read(f"outbox/{file.name}", UpdateManifest) for file in files]
        return {manifest.update: manifest for manifest in found}

    def put_outbox(self, manifest: UpdateManifest, data: bytes) -> None:
        """Keep an update until the aggregator has it; the manifest is written last and makes it count."""
        folder = self.folder / "outbox"
        write_atomic(folder / f"{manifest.update}.bin", data)
        write_atomic(folder / f"{manifest.update}.json", encode(manifest))
        self._outbox[manifest.update] = manifest

    def outbox(self) -> list[UpdateManifest]:
        """Updates that wait, oldest first."""
        return sorted(self._outbox.values(), key=lambda manifest: manifest.version)  # many boards have no clock

    def waiting(self, update: str) -> UpdateManifest | None:
        """The manifest of an update, if it waits."""
        return self._outbox.get(update)

    def outbox_data(self, manifest: UpdateManifest) -> bytes:
        """The tensors of an update that waits."""
        return (self.folder / "outbox" / f"{manifest.update}.bin").read_bytes()

    def drop_outbox(self, update: str) -> UpdateManifest | None:
        """Let go of an update and return it, if it was there."""
        manifest = self._outbox.pop(update, None)
        if manifest is not None:
            file = self.folder / "outbox" / f"{update}.json"
            file.unlink(missing_ok=True)
            file.with_suffix(".bin").unlink(missing_ok=True)
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
