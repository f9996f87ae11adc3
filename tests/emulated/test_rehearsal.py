"""A whole board: it boots the image, takes its seed, survives a power cut, becomes a member and trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.emulator.image import check_foreign
from fleetune.tools.firstboot.steps import STEPS
from support.lacking import lacking

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

PROGRAMS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "mmdebstrap": "mmdebstrap",
    "mosquitto": "mosquitto",
    "mcopy": "mtools",
}
BUDGET = 128


@pytest.fixture(scope="module")
def rehearsal(tiny_bert_pack: Pack, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a rehearsal in which the power was cut while the board measured itself."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None and shutil.which(program, path="/usr/sbin") is None:
            lacking(f"needs {program}: apt-get install {package}")
    try:
        check_foreign()
    except ConfigError as error:
        lacking(f"needs programs for arm64 to run: {error.remedy}")
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "fleetune.tools.cli", "flash", "rehearse", "--pack", tiny_bert_pack.path]
    command += ["--data", text_data, "--budget", str(BUDGET), "--cut", "measure", "--json"]
    command += ["--images", folder / "images", "--out", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "out/rehearsal.json").read_text(encoding="utf-8"))
    return folder / "out"


@pytest.fixture(scope="module")
def report(rehearsal: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((rehearsal / "rehearsal.json").read_text(encoding="utf-8"))
    return found


def test_the_first_boot_came_to_its_end_through_a_power_cut(rehearsal: Path, report: dict[str, Any]) -> None:
    assert report["cut"] == "measure"
    assert set(report["first_boot"]) == set(STEPS)
    assert report["seconds"]["cut"] < report["seconds"]["up_again"] < report["seconds"]["provisioned"]
    console = (rehearsal / "console.log").read_text(errors="replace")
    assert console.count("Booting Linux on physical CPU") == 2


def test_the_root_file_system_has_grown_to_the_disk(report: dict[str, Any]) -> None:
    assert report["root_mib"] > 3500


def test_its_token_is_nowhere_any_more(rehearsal: Path) -> None:
    (seed,) = rehearsal.glob("seeds/*.img")
    listed = subprocess.run([shutil.which("mdir") or "mdir", "-b", "-i", seed], capture_output=True, text=True)
    assert "seed.json" in listed.stdout
    assert "token" not in listed.stdout
    (kept,) = rehearsal.glob("seeds/*/token")
    token = kept.read_bytes().strip()
    assert token not in seed.read_bytes()
    assert token not in (rehearsal / "journal.log").read_bytes()


def test_the_agent_runs_as_its_own_user_within_its_budget(report: dict[str, Any]) -> None:
    agent = report["agent"]
    assert (agent["state"], agent["user"], agent["restarts"]) == ("active", "fleetune", 0)
    assert agent["memory_max_mib"] == BUDGET * 1.25
    assert agent["memory_peak_mib"] <= agent["memory_max_mib"]
    assert agent["killed_for_memory"] == 0


def test_the_aggregator_accepted_what_it_trained(report: dict[str, Any]) -> None:
    metrics = [update["metrics"] for update in report["accepted"]]
    assert [update["job"] for update in report["accepted"]] == ["fedms"] * len(metrics)
    assert len(metrics) >= 2
    assert all(of["peak_mib"] <= BUDGET for of in metrics)
    assert {"test_global", "test_local", "test_mixture"} <= metrics[-1].keys()
