"""The runner, with a rig that is real and boards that are stand-ins: what is skipped, and what is not called passed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.tools.cli import main
from support.lacking import lacking

FLEET = """\
schema: 1
fleet: lab
devices:
  - {id: nano-1, profile: jetson-nano-2gb, budget: {memory: 512MiB}}
  - {id: nano-2, profile: jetson-nano-2gb, budget: {memory: 512MiB}}
"""


@pytest.fixture
def lab(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a rig, and an environment for each of two boards in ``hil``."""
    if shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/sbin") is None:
        lacking("needs Mosquitto: apt-get install mosquitto")
    inventory = tmp_path / "fleet.yaml"
    inventory.write_text(FLEET, encoding="utf-8")
    pack, host = str(tiny_bert_pack.path), "localhost"
    with pytest.raises(SystemExit) as ended:
        main(["hil", "rig", "--inventory", str(inventory), "--pack", pack, "--data", str(text_data), "--host", host,
              "--out", str(tmp_path / "rigs")])  # fmt: skip
    assert not ended.value.code
    (tmp_path / "hil").mkdir()
    for name in ("nano-1", "nano-2"):
        environment(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of the stand-ins
    return tmp_path


def environment(folder: Path, name: str, *, silent: bool = False) -> None:
    document = {
        "targets": {"main": {"drivers": [{"StandInDriver": {"silent": silent}}, {"FleetuneStrategy": {}}]}},
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


def test_a_board_that_does_not_answer_fails_once_and_is_left_alone(lab: Path) -> None:
    environment(lab, "nano-1", silent=True)
    assert run("--env", "hil/nano-1.yaml", "--tests", "test_boot") == RunFailedError.exit_code
    outcomes = list(report(lab)["nano-1"].values())
    assert outcomes == ["error", *["skipped"] * (len(outcomes) - 1)]
    assert "the board does not answer" in (lab / "runs/hil/nano-1/pytest.log").read_text(encoding="utf-8")


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
    ],
)
def test_what_is_missing_is_named(lab: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
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
