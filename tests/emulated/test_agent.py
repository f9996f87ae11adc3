"""The device's own program: its command line, and a small run with an aggregator on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from emulated.device import Device
from fleetune.edge.pack.pack import Pack
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.journal import FILE as JOURNAL
from fleetune.server.journal import Accepted, Finished, read_records

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

CLI = ("-m", "fleetune.tools.cli")


def test_the_command_line_comes_up_from_the_plain_install(device: Device) -> None:
    done = device.run(*CLI, "agent", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: fleetune agent")
    assert {"--fleet", "--id", "--pack", "--data", "--state"} <= set(done.stdout.split())


@pytest.fixture
def broker() -> Iterator[str]:
    with embedded_broker(free_port()) as address:
        yield str(address)


def test_an_emulated_device_takes_part_in_a_fleet(
    nano: Device, broker: str, tiny_bert_pack: Pack, text_data: Path, tmp_path: Path
) -> None:
    """It measures, which starts processes of its own, then plans, trains, uploads and evaluates."""
    fleet = tmp_path / "fleet.yaml"
    budget: dict[str, Any] = {"memory": "1GiB", "cpu_seconds": 1000}
    devices = [{"id": "cam-01", "profile": "jetson-nano-4gb", "budget": budget}]
    fleet.write_text(yaml.safe_dump({"schema": 1, "fleet": "lab", "devices": devices}))
    common = ["--fleet", str(fleet), "--pack", str(tiny_bert_pack.path), "--broker", broker]
    job = ["--classes", "2", "--batch", "4", "--max-depth", "2", "--global-rounds", "1", "--personal-rounds", "1"]
    serve = [sys.executable, *CLI, "serve", *common, *job, "--state", str(tmp_path / "aggregator")]
    own = ["--id", "cam-01", "--data", str(text_data), "--state", str(tmp_path / "cam-01"), "--threads", "1"]
    with (tmp_path / "agent.log").open("w+") as log, nano.start(*CLI, "agent", *common, *own, stderr=log) as agent:
        try:
            done = subprocess.run(serve, capture_output=True, text=True, timeout=900, check=False)
        finally:
            agent.terminate()
            agent.wait(30)
        log.seek(0)
        assert done.returncode == 0, done.stderr + log.read()
    records = list(read_records(tmp_path / "aggregator" / JOURNAL))
    assert isinstance(records[-1], Finished)
    last = [record.manifest for record in records if isinstance(record, Accepted)][-1]
    assert last.device == "cam-01"
    assert {"test_global", "test_local", "test_mixture"} <= last.metrics.keys()
