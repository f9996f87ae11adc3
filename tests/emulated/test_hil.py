"""A farm of two emulated boards, and the suite on one, as their commands run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from support.emulation import need_emulator
from support.lacking import lacking

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

CHOSEN = ("test_boot", "test_doctor", "test_state", "test_console", "test_broker", "slow_link")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images are."""
    need_emulator()
    return tmp_path_factory.mktemp("hil")


def fleetune(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleetune.tools.cli", "hil", *options, "--json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600, check=False)


@pytest.fixture(scope="module")
def farm(folder: Path) -> dict[str, Any]:
    """What a farm reports, whose boards have measured for all others of their kind."""
    if os.geteuid() != 0:
        lacking("networks need root")
    done = fleetune(folder, "farm", "--boards", "2", "--rate", "256")
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


@pytest.fixture(scope="module")
def tests(folder: Path, farm: dict[str, Any]) -> dict[str, Any]:
    """What came of some tests of the suite: the others take as long as all that is here together."""
    done = fleetune(folder, "run", "--env", "qemu-nano-2g", "--tests", f"({' or '.join(CHOSEN)}) or throttle_in")
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


@pytest.mark.usefixtures("farm")  # which has made the image
def test_a_shell_is_had_on_the_console(folder: Path) -> None:
    command = [sys.executable, "-m", "fleetune.tools.cli", "hil", "shell"]
    console = pexpect.spawn(command[0], command[1:], cwd=str(folder), timeout=300.0, encoding="utf-8")
    console.expect("login: ")
    console.sendline("root")
    console.expect("# ")
    console.sendline("echo $((6 * 7)); fleetune --version")
    console.expect("42\r\n")
    console.expect("fleetune [0-9]")
    console.send("\x01x")  # as the help has it
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
