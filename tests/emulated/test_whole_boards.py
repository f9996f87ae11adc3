"""Whole boards, as their commands run them: a rehearsal of flashing, a farm of two, the suite, a shell.

One after the other, on one image: the first board measures what training costs, and the others take that over.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.emulator.board import make_board_image
from fleetune.tools.firstboot.steps import STEPS
from fleetune.tools.hil.releases import build_like, forget_wheels
from support.emulation import need_emulator
from support.lacking import lacking

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

FLEETUNE = [sys.executable, "-m", "fleetune.tools.cli"]
BUDGET = 192
CHOSEN = ("test_boot", "test_doctor", "test_state", "test_console", "test_broker", "slow_link")


def fleetune(folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*FLEETUNE, *options, "--json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images are, and what is run with them."""
    need_emulator()
    return tmp_path_factory.mktemp("boards")


# --- a rehearsal: the power is cut while the board measures itself; then comes a good release, and a bad one ----------


@pytest.fixture(scope="module")
def rehearsal(folder: Path) -> Path:
    """What a rehearsal left."""
    record = make_board_image(folder / "images", None, None, lambda _: None).record
    good = build_like(record, folder / "good", lambda package: (package / "tools/NEWS").write_text("none"))
    bad = build_like(record, folder / "bad", forget_wheels)
    options = ["--budget", str(BUDGET), "--cut", "measure", "--then", good, "--then", bad]
    done = fleetune(folder, "flash", "rehearse", *options)
    assert done.returncode == RunFailedError.exit_code, done.stderr
    assert f"does not come up with {bad};" in done.stderr, done.stderr[-2000:]
    out = folder / "runs/rehearsal"
    assert json.loads(done.stdout) == json.loads((out / "rehearsal.json").read_text(encoding="utf-8"))
    return out


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
    assert "ModuleNotFoundError: No module named" in journal
    assert "release 2 did not come up, and release 1 runs again" in journal


def test_it_looks_for_releases_by_itself(report: dict[str, Any]) -> None:
    assert report["looks_for_releases"]


# --- a farm ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(folder: Path) -> dict[str, Any]:
    """What a farm reports; it plans with what the rehearsed board has measured, if that came so far."""
    if os.geteuid() != 0:
        lacking("networks need root")
    done = fleetune(folder, "hil", "farm", "--boards", "2", "--rate", "256")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report == json.loads((folder / "runs/hil-farm/report.json").read_text(encoding="utf-8"))
    return report


def test_two_boards_of_a_farm_train_the_two_depths_that_were_planned(farm: dict[str, Any]) -> None:
    devices = farm["devices"].values()
    assert {device["profile"] for device in devices} == {"jetson-nano-2gb", "jetson-nano-4gb"}
    assert len({device["plan"]["depth"] for device in devices}) == 2
    for device in devices:
        assert [one["depth"] for one in device["rounds"]] == [device["plan"]["depth"]] * 3


# --- the suite, and a shell -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tests(folder: Path) -> dict[str, Any]:
    """What came of some tests of the suite: the others take as long as all that is here together."""
    done = fleetune(folder, "hil", "run", "--env", "qemu-nano-2g", "--tests", f"({' or '.join(CHOSEN)}) or throttle_in")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["boards"]["qemu-nano-2g"]
    return found


def test_the_board_passes_and_what_it_cannot_do_is_not_called_passed(tests: dict[str, Any]) -> None:
    assert {name.partition(".py::")[0] for name in tests} == {*CHOSEN[:-1], "test_faults"}
    others = {name.partition("::")[2]: result["why"] for name, result in tests.items() if result["outcome"] != "passed"}
    assert others == {"test_it_does_not_throttle_in_a_round": "needs hardware: thermal"}


def test_what_was_measured_is_in_the_report(folder: Path, tests: dict[str, Any]) -> None:
    figures = tests["test_faults.py::test_a_slow_link_is_enough"]["figures"]
    assert figures["update"]["unit"] == "bytes"
    assert 0 < figures["over 16 kbit/s"]["value"] < 60
    page = (folder / "runs/hil/report.html").read_text(encoding="utf-8")
    assert "a slow link is enough" in page
    assert "needs hardware: thermal" in page
    assert (folder / "runs/hil/junit.xml").read_text(encoding="utf-8").count("<testcase ") == len(tests)


def test_a_shell_is_had_on_the_console(folder: Path) -> None:
    console = pexpect.spawn(
        FLEETUNE[0], [*FLEETUNE[1:], "hil", "shell"], cwd=str(folder), timeout=900.0, encoding="utf-8"
    )
    console.expect(r"root@\S+# ")
    console.sendline("echo $((6 * 7)); fleetune --version")
    console.expect("42\r")
    console.expect("fleetune [0-9]")
    console.send("\x01x")  # as the help has it
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
