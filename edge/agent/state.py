"""What an agent keeps on disk: counters, costs, payloads that came down, updates that wait to go up."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.methods.base import Tensors
from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.messages import Payload, UpdateManifest, encode
from fleetune.edge.protocol.topics import check_name
from fleetune.edge.resources.costs import Costs

_KEEP_PAYLOADS = 4


class Counters(msgspec.Struct):
    """Counts that grow over restarts.

    Attributes:
        boot: Starts of the agent.
        bytes_up: Payload bytes sent, by runs before this one.
        bytes_down: Payload bytes received, by runs before this one.
        answered: Job → newest version that was answered.
    """

    boot: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    answered: dict[str, int] = {}


class State:
    """A folder.

    Args:
        folder: Created if it does not exist.
        device: The id it belongs to; another id in the same folder is an error.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        owner = folder / "device"
        if owner.is_file() and owner.read_text() != device:
            raise ConfigError(
                f"state: {folder} belongs to the device {owner.read_text()!r}, not to {device!r}",
                "give every device a state folder of its own",
            )
        write_atomic(owner, device.encode())
        self.counters = self._read("counters.json", Counters) or Counters()

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

    def store(self, job: str) -> JobStore:
        """The private tensors of a job."""
        return JobStore(self.folder / "jobs" / check_name("job", job))

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

    def put_outbox(self, manifest: UpdateManifest, data: bytes) -> None:
        """Keep an update until the aggregator has it; the manifest is written last and makes it count."""
        folder = self.folder / "outbox"
        write_atomic(folder / f"{manifest.update}.bin", data)
        write_atomic(folder / f"{manifest.update}.json", encode(manifest))

    def outbox(self) -> list[tuple[UpdateManifest, bytes]]:
        """Updates that wait, oldest first."""
        files = sorted((self.folder / "outbox").glob("*.json"), key=lambda file: file.stat().st_mtime)
        return [
            (self._read(f"outbox/{file.name}", UpdateManifest), file.with_suffix(".bin").read_bytes()) for file in files
        ]

    def drop_outbox(self, update: str) -> bool:
        """Let go of an update; False if it was not there."""
        file = self.folder / "outbox" / f"{check_name('update', update)}.json"
        there = file.is_file()
        file.unlink(missing_ok=True)
        file.with_suffix(".bin").unlink(missing_ok=True)
        return there


class JobStore:
    """A method's private tensors: one safetensors file for each name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Replace what is stored under ``name``, atomically."""
        write_atomic(self._folder / f"{name}.safetensors", safetensors.numpy.save(dict(tensors)))

    def load(self, name: str) -> Tensors | None:
        """What was stored under ``name``, if anything was.

        Raises:
            ConfigError: The file is damaged.
        """
        file = self._folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            tensors: Tensors = safetensors.numpy.load(file.read_bytes())
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{file} is damaged: {error}", "delete the device's state folder") from error
        return tensors
