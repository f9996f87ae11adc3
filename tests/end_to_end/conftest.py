"""Real processes on real brokers: what the tests of a whole fleet start, watch and kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import Costs, measure
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.journal import FILE, Record, read_records
from support import brokers

BLOCKER = """\
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "optimum", "bitsandbytes", "onnx"}:
            raise ImportError(f"a device must not import {name}")
sys.meta_path.insert(0, Blocker())
"""
"""Put in the way of every agent: a device that reaches for torch dies."""


@dataclass
class Command:
    """A running ``fleetune`` command."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout: float = 240.0) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s; it wrote:\n{self.output}") from None

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, closed or said goodbye to."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        """What it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass
class TestFleet:
    """Two devices and an aggregator in a folder."""

    __test__ = False

    folder: Path
    pack: Path
    data: dict[str, Path]
    broker: str
    costs: Path
    started: list[Command] = field(default_factory=list)

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> Command:
        """Start a command."""
        log = self.folder / f"{len(self.started)}-{arguments[0]}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fleetune.tools.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
        command = Command(process, log)
        self.started.append(command)
        return command

    @property
    def file(self) -> Path:
        """The fleet file."""
        return self.folder / "fleet.yaml"

    def write(self, budgets: dict[str, tuple[str, float]], profile: str = "raspberry-pi-5", **disk: str) -> None:
        """Write the fleet file: device → memory and CPU seconds; and its disk, if it states one."""
        devices = [
            {
                "id": device,
                "profile": profile,
                "budget": {"memory": memory, "cpu_seconds": cpu, **({"disk": disk[device]} if device in disk else {})},
            }
            for device, (memory, cpu) in budgets.items()
        ]
        self.file.write_text(yaml.safe_dump({"schema": 1, "fleet": "lab", "devices": devices}))

    def serve(self, *more: str) -> Command:
        """Start the aggregator."""
        return self.start(
            *("serve", "--fleet", str(self.file), "--pack", str(self.pack), "--broker", self.broker),
            *("--state", str(self.folder / "aggregator"), "--classes", "2", "--batch", "4", "--max-depth", "3"),
            "--keep-history",
            *more,
        )

    def agent(self, device: str, *more: str) -> Command:
        """Start a device's agent, with torch out of its reach."""
        blocker = self.folder / "blocker"
        blocker.mkdir(exist_ok=True)
        (blocker / "sitecustomize.py").write_text(BLOCKER)
        return self.start(
            *("agent", "--fleet", str(self.file), "--pack", str(self.pack), "--broker", self.broker, "--id", device),
            *("--data", str(self.data[device]), "--state", str(self.folder / device), "--threads", "1"),
            *("--costs", str(self.costs)),
            *more,
            env={"PYTHONPATH": str(blocker)},
        )

    def records(self) -> list[Record]:
        """The aggregator's journal."""
        path = self.folder / "aggregator" / FILE
        return list(read_records(path)) if path.exists() else []

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait for something; if it does not come, show what every command wrote."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "\n".join(command.output for command in self.started)
            time.sleep(0.02)

    def wait_for(self, what: Callable[[list[Record]], bool]) -> None:
        """Wait until ``what(records)`` is true."""
        self.wait_until(lambda: what(self.records()))

    def stop(self) -> None:
        """End everything."""
        for command in self.started:
            command.process.kill()
            command.process.wait()


@pytest.fixture(scope="session")
def tiny_costs(tiny_bert_pack: Pack, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training costs here, measured once."""
    lengths = read_dataset(text_data, tiny_bert_pack).lengths
    costs: Costs = measure(tiny_bert_pack, threads=1, longest=int(lengths.max()))
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    path.write_bytes(encode(costs))
    return path


@pytest.fixture(scope="session")
def embedded() -> Iterator[str]:
    """The embedded broker."""
    with embedded_broker(free_port()) as address:
        yield str(address)


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's Mosquitto."""
    with brokers.mosquitto(tmp_path_factory.mktemp("mosquitto"), free_port()) as broker:
        yield str(broker.address)


@pytest.fixture(params=["embedded", "mosquitto"])
def any_broker(request: pytest.FixtureRequest) -> str:
    """Each broker in turn."""
    address: str = request.getfixturevalue(request.param)
    return address


@pytest.fixture
def make_fleet(tmp_path: Path, tiny_bert_pack: Pack, text_data: Path, tiny_costs: Path) -> Iterator[Any]:
    """Makes fleets of the devices ``big`` and ``small`` on a broker, and ends their processes."""
    made: list[TestFleet] = []

    def make(broker: str, name: str = "fleet") -> TestFleet:
        folder = tmp_path / name
        folder.mkdir()
        lines = text_data.read_text().splitlines()
        data = {"big": folder / "big.jsonl", "small": folder / "small.jsonl"}
        data["big"].write_text("\n".join(lines) + "\n")
        data["small"].write_text("\n".join(lines[:10] + lines[14:]) + "\n")
        fleet = TestFleet(folder, tiny_bert_pack.path, data, broker, tiny_costs)
        fleet.write({"big": ("1GiB", 100.0), "small": ("1GiB", 100.0)})
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        fleet.stop()
