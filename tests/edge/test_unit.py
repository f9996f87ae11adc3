"""The systemd unit: what systemd itself says of it, and that it runs the command that was asked for."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.agent.unit import systemd_unit

COMMAND = [
    sys.executable,
    "-m",
    "fleetune.tools.cli",
    "agent",
    "--id",
    "cam 1",
    "--state",
    "/var/lib/100% 'mine' $HOME",
]


def unit() -> str:
    return systemd_unit("cam 1", COMMAND, Path("/var/lib/fleetune"))


def test_systemd_accepts_it(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed (apt-get install systemd)")
    file = tmp_path / "fleetune-agent.service"
    file.write_text(unit())
    done = subprocess.run([program, "verify", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fleetune-agent" not in done.stderr


def test_the_command_arrives_word_for_word() -> None:
    line = next(line for line in unit().splitlines() if line.startswith("ExecStart="))
    read = line.removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$")
    assert shlex.split(read) == COMMAND


def test_it_is_watched_and_started_again() -> None:
    text = unit()
    for line in ("Type=notify", "WatchdogSec=300", "Restart=always", "ReadWritePaths=/var/lib/fleetune"):
        assert f"\n{line}\n" in text


def test_the_agent_prints_it_with_absolute_paths(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("schema: 1\nfleet: lab\ndevices:\n  - {id: n, profile: raspberry-pi-5, budget: {memory: 1GiB}}\n")
    command = [sys.executable, "-m", "fleetune.tools.cli", "agent", "--fleet", "fleet.yaml", "--id", "n"]
    (tmp_path / "hot/sys").mkdir(parents=True)
    command += ["--pack", "pack", "--data", "data.jsonl", "--state", "state", "--codec", "int4+zlib", "--unit"]
    command += ["--sensors", "hot"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (
        f"--fleet {fleet}",
        f"--pack {tmp_path / 'pack'}",
        f"--state {tmp_path / 'state'}",
        f"--sensors {tmp_path / 'hot'}",
        "--codec int4+zlib",
    ):
        assert word in done.stdout
    assert not (tmp_path / "state").exists()


def test_the_agent_keeps_its_owners_limits_there(tmp_path: Path) -> None:
    """A device that starts again without them would take any job."""
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("schema: 1\nfleet: lab\ndevices:\n  - {id: n, profile: raspberry-pi-5, budget: {memory: 1GiB}}\n")
    command = [sys.executable, "-m", "fleetune.tools.cli", "agent", "--fleet", str(fleet), "--id", "n"]
    command += ["--pack", "pack", "--data", "data.jsonl", "--state", "state", "--unit"]
    command += ["--dp-min-noise", "0.75", "--dp-max-updates", "40"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dp-min-noise 0.75 --dp-max-updates 40" in done.stdout
