"""The runner, with a rig that is real and boards that are stand-ins: what is skipped, and what is not called passed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, DataError, RunFailedError, RunFolderError
from fleetune.tools.cli import main
from fleetune.tools.rig import rig_ports
from fleetune.tools.waiting import wait_until
from support.lacking import lacking

FLEET = """\
schema: 1
fleet: lab
devices:
  - {id: nano-1, profile: jetson-nano-2gb, budget: {memory: 512MiB}}
  - {id: nano-2, profile: jetson-nano-2gb, budget: {memory: 512MiB}}
"""


@pytest.fixture
def make_rigs(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> Callable[..., object]:
    """Makes rigs, with more options, and returns the exit code."""
    inventory = tmp_path / "fleet.yaml"
    inventory.write_text(FLEET, encoding="utf-8")
    usual = ["--inventory", inventory, "--pack", tiny_bert_pack.path, "--data", text_data, "--host", "localhost"]

    def make(*options: str) -> object:
        with pytest.raises(SystemExit) as ended:
            main(["hil", "rig", *map(str, usual), "--out", str(tmp_path / "rigs"), *options])
        return ended.value.code

    return make


@pytest.fixture
def lab(make_rigs: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a rig, and an environment for each of two boards in ``hil``."""
    if shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/sbin") is None:
        lacking("needs Mosquitto: apt-get install mosquitto")
    assert not make_rigs()
    (tmp_path / "hil").mkdir()
    for name in ("nano-1", "nano-2"):
        environment(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of the stand-ins
    return tmp_path


def environment(folder: Path, name: str, strategy: str = "FleetuneStrategy", **board: bool) -> None:
    document = {
        "targets": {"main": {"drivers": [{"StandInDriver": board}, {strategy: {}}]}},
        "options": {"fleetune_device": name},
        "imports": ["fleetune.tools.hil.strategy", "support.standin"],
    }
    (folder / f"hil/{name}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def run(*options: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["hil", "run", *options])
    return ended.value.code


def report(lab: Path) -> dict[str, dict[str, str]]:
    boards = json.loads((lab / "runs/hil/report.json").read_text(encoding="utf-8"))["boards"]
    return {name: {test: result["outcome"] for test, result in tests.items()} for name, tests in boards.items()}


def test_what_a_board_cannot_do_is_skipped_by_name_and_never_passes(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("--env", "hil/nano-1.yaml", "--tests", "power_cut or throttle_in", "--json")
    assert code == RunFailedError.exit_code  # nothing passed
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    tests = found["boards"]["nano-1"]
    assert {result["outcome"] for result in tests.values()} == {"skipped"}
    assert {result["why"] for result in tests.values()} == {"needs hardware: power", "needs hardware: thermal"}


def test_a_board_that_does_not_answer_fails_once_and_is_left_alone(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(lab, "nano-1", silent=True)
    assert run("--env", "hil/nano-1.yaml", "--tests", "test_boot") == RunFailedError.exit_code
    outcomes = list(report(lab)["nano-1"].values())
    assert outcomes == ["error", *["skipped"] * (len(outcomes) - 1)]
    assert "TimeoutError: the board does not answer" in capsys.readouterr().err  # not that the strategy is broken


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("LabStrategy", "TimeoutError: the board does not answer"),
        ("ForeignStrategy", "ConfigError: nano-1: ForeignStrategy is no FleetuneStrategy"),
    ],
)
def test_a_lab_may_derive_a_strategy_of_its_own(
    lab: Path, capsys: pytest.CaptureFixture[str], driver: str, said: str
) -> None:
    environment(lab, "nano-1", driver, silent=True)
    assert run("--env", "hil/nano-1.yaml", "--tests", "looks_for_releases") == RunFailedError.exit_code
    assert said in capsys.readouterr().err


def test_all_boards_are_in_one_report(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--all", "--tests", "looks_for_releases or throttle_in")
    found = report(lab)
    assert found.keys() == {"nano-1", "nano-2"}
    assert found["nano-1"] == found["nano-2"]  # each has a broker of its own
    out = capsys.readouterr()
    assert "nano-2" in out.out
    assert "\nnano-1: test_boot.py::test_it_looks_for_releases_by_itself ERROR" in f"\n{out.err}"
    assert "nano-1: nano-1 starts" in out.err
    assert (lab / "runs/hil/junit.xml").read_text(encoding="utf-8").count("<testsuite ") == 2


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("goes_back", "could not be tried: nano-1: test_update.py::test_it_goes_back"),
        ("test_boot or power_cut", "no test of a fault was tried"),
    ],
)
def test_a_protection_that_cannot_be_switched_off_shows_nothing(
    lab: Path, capsys: pytest.CaptureFixture[str], tests: str, said: str
) -> None:
    build = lab / "made.build.json"
    build.write_text("{}", encoding="utf-8")
    code = run("--env", "hil/nano-1.yaml", "--without", "--build", str(build), "--tests", tests)
    assert code == RunFailedError.exit_code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no board is named"),
        (["--env", "nowhere"], "there is no nowhere"),
        (["--env", "hil/nano-1.yaml", "--rigs", "elsewhere"], "there is no elsewhere/nano-1"),
        (["--all", "elsewhere"], "elsewhere has no environments"),
        (["--env", "nano-1"], "name its environment: hil/nano-1.yaml"),
        (["--all", "--env", "twin.yaml"], "two environments are of nano-1"),
        (["--env", "hil/nano-1.yaml", "--build", "nothing.build.json"], "there is no nothing.build.json"),
        (["--env", "hil/nano-1.yaml", "--tests", "nothing_like_it"], "'nothing_like_it' chooses no test"),
    ],
)
def test_what_is_missing_is_named(lab: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    shutil.copy(lab / "hil/nano-1.yaml", lab / "twin.yaml")
    assert run(*options) == ConfigError.exit_code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "shell"])
def test_without_qemu_it_says_what_to_install(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("PATH", str(lab))
    with pytest.raises(SystemExit) as ended:
        main(["hil", command, "--env", "qemu-nano-2g"])
    assert ended.value.code == ConfigError.exit_code
    assert "apt-get install qemu-system-arm" in capsys.readouterr().err
    assert not (lab / "images").exists()  # nothing was built for it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_it_is_ended_with_its_group_nothing_of_a_rig_stays(lab: Path, number: signal.Signals) -> None:
    environment(lab, "nano-1", hangs=True)
    command = [sys.executable, "-m", "fleetune.tools.cli", "hil", "run", "--env", "hil/nano-1.yaml"]
    running = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until(
            lambda: len(of_rig(lab)) >= 3, 60.0, lambda: AssertionError(of_rig(lab))
        )  # pytest, broker, authority
        os.killpg(running.pid, number)
        running.wait(60.0)
        assert of_rig(lab) == []
    finally:
        running.kill()


def of_rig(lab: Path) -> list[str]:
    """Command lines of processes that name the rig."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(lab / "rigs") in line]


# --- tests of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rig=rigs/nano-1"], "--lg-env=hil/NAME.yaml"),
        (["--lg-env=hil/nano-1.yaml"], "--rig=rigs/NAME"),
        (["--lg-env=hil/nano-1.yaml", "--rig=rigs"], "--rig: rigs is no rig"),
    ],
)
def test_without_a_board_or_its_rig_no_run_looks_like_success(lab: Path, options: list[str], said: str) -> None:
    (lab / "tests").mkdir()
    (lab / "tests/conftest.py").write_text('pytest_plugins = ["fleetune.tools.hil.plugin"]\n', encoding="utf-8")
    (lab / "tests/test_mine.py").write_text("def test_it(fleet_device): pass\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr + done.stdout


# --- rigs -------------------------------------------------------------------------------------------------------------


def test_a_rig_is_for_one_host(lab: Path, make_rigs: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    assert make_rigs("--host", "elsewhere") == RunFolderError.exit_code
    assert "nano-1 was made for the host localhost, not elsewhere" in capsys.readouterr().err
    assert not make_rigs()


@pytest.mark.parametrize("option", ["--pack", "--data"])
def test_a_rig_stays_as_it_was_made_or_another_is_asked_for(
    lab: Path,
    make_rigs: Callable[..., object],
    text_data: Path,
    tiny_bert_pack: Pack,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    other = lab / "other"
    if option == "--data":
        other.write_bytes(text_data.read_bytes() + text_data.read_bytes().splitlines(keepends=True)[0])
    else:
        shutil.copytree(tiny_bert_pack.path, other)
        (other / "manifest.json").write_bytes((other / "manifest.json").read_bytes() + b"\n")
    assert make_rigs(option, str(other)) == RunFolderError.exit_code
    assert f"nano-1 was made of another {option} than {other}" in capsys.readouterr().err


def test_rigs_take_the_ports_that_a_firewall_lets_through(
    lab: Path, make_rigs: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not make_rigs("--out", str(lab / "others"), "--ports", "20100")
    ports = [rig_ports(lab / "others" / name) for name in ("nano-1", "nano-2")]
    assert ports == [(20100, 20101, 20102), (20103, 20104, 20105)]
    shutil.rmtree(lab / "others/nano-1")
    assert not make_rigs("--out", str(lab / "others"), "--ports", "20102")
    assert rig_ports(lab / "others/nano-1") == (20102, 20106, 20107)
    for first in ("0", "65531"):
        assert make_rigs("--out", str(lab / "none"), "--ports", first) == ConfigError.exit_code
        assert f"--ports: 6 ports are not to be had from {first} up" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [1, 3])
def test_a_rig_is_made_with_data_of_two_classes(
    lab: Path, make_rigs: Callable[..., object], text_data: Path, capsys: pytest.CaptureFixture[str], labels: int
) -> None:
    rows = [json.loads(line) for line in text_data.read_text(encoding="utf-8").splitlines()]
    data = lab / "mine.jsonl"
    text = "".join(json.dumps(row | {"label": number % labels}) + "\n" for number, row in enumerate(rows))
    data.write_text(text, encoding="utf-8")
    assert make_rigs("--out", str(lab / "others"), "--data", str(data)) == DataError.exit_code
    assert f"mine.jsonl has {labels} classes" in capsys.readouterr().err
    assert not (lab / "others").exists()


def test_of_a_rig_that_cannot_be_made_nothing_stays(lab: Path, make_rigs: Callable[..., object]) -> None:
    others = lab / "others"
    assert make_rigs("--out", str(others), "--host", "no host") == ConfigError.exit_code
    assert list(others.glob("*")) == []
    assert not make_rigs("--out", str(others))
