"""A whole board: it boots the image, takes its seed, survives a power cut, becomes a member, trains, and is updated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.firstboot.steps import STEPS
from fleetune.tools.flash.record import ENDING
from fleetune.tools.hil.releases import build_like
from support.emulation import need_emulator

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

BUDGET = 128


@pytest.fixture(scope="module")
def rehearsal(tiny_bert_pack: Pack, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one in which the power was cut while the board measured itself; then came a good release, and a bad one."""
    need_emulator()
    folder = tmp_path_factory.mktemp("rehearsal")
    images = folder / "images"
    fleetune = [sys.executable, "-m", "fleetune.tools.cli", "flash"]
    command = [*fleetune, "build", "--tier", "t4", "--pack", tiny_bert_pack.path, "--out", images]
    subprocess.run(command, capture_output=True, timeout=600, check=True)
    (record,) = images.glob(f"*{ENDING}")
    good = build_like(record, folder / "good", lambda package: (package / "tools/NEWS").write_text("none"))
    bad = build_like(record, folder / "bad", lambda package: (package / "edge/agent/__init__.py").write_text("1 / 0"))
    command = [*fleetune, "rehearse", "--pack", tiny_bert_pack.path, "--data", text_data, "--budget", str(BUDGET)]
    command += ["--cut", "measure", "--then", good, "--then", bad, "--json"]
    command += ["--images", images, "--out", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == RunFailedError.exit_code, done.stderr
    assert f"does not come up with {bad};" in done.stderr
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


def test_it_takes_a_release_and_runs_it(report: dict[str, Any]) -> None:
    good, _ = report["releases"]
    assert good["good"]
    assert good["runs"] == good["kit"]


def test_it_goes_back_from_a_release_that_does_not_come_up(rehearsal: Path, report: dict[str, Any]) -> None:
    good, bad = report["releases"]
    assert not bad["good"]
    assert bad["runs"] == good["kit"] != bad["kit"]
    journal = (rehearsal / "journal.log").read_text(encoding="utf-8")
    assert "ZeroDivisionError" in journal
    assert "release 2 did not come up, and release 1 runs again" in journal


def test_it_looks_for_releases_by_itself(report: dict[str, Any]) -> None:
    assert report["looks_for_releases"]
