"""The demo as a user runs it, on few samples: stopped in the middle, started again, read back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.errors import RunFolderError
from fleetune.tools.demo.folder import RunFolder

pytest.importorskip("torch", reason="the demo packs a backbone: pip install 'fleetune[all]'")

FEW = ("--samples", "32", "--global-rounds", "2", "--personal-rounds", "1", "--sal-start", "4")
ACCURACIES = {"frozen_head", "standalone", "global_expert", "local_expert", "mixture"}


def demo(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fleetune.tools.cli", "demo", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def processes_of(out: Path) -> list[str]:
    """Command lines of live processes that name the run's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended while we looked
            continue
        if int(entry.parent.name) != os.getpid() and any(str(out) in word for word in words):
            found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run that was stopped with Ctrl-C while the fleet trained."""
    out = tmp_path_factory.mktemp("demo") / "run"
    process = demo(out, *FEW)
    journal = out / "aggregator" / "journal.jsonl"
    deadline = time.monotonic() + 180
    while not (journal.exists() and '"stage":"global"' in journal.read_text(encoding="utf-8")):
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return out, *end(process)


@pytest.fixture(scope="module")
def finished(interrupted: tuple[Path, int, str]) -> tuple[Path, dict[str, Any], str]:
    """The same run, started again."""
    out, *_ = interrupted
    code, output = end(demo(out, *FEW))
    assert code == 0, output
    return out, json.loads((out / "report.json").read_text(encoding="utf-8")), output


def test_ctrl_c_stops_every_process_and_says_how_to_go_on(interrupted: tuple[Path, int, str]) -> None:
    out, code, output = interrupted
    assert code == 130
    assert "Traceback" not in output
    assert "goes on" in output
    assert processes_of(out) == []
    assert not (out / "report.json").exists()


def test_the_same_command_goes_on_where_it_stopped(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, output = finished
    assert "goes on with an interrupted run" in output
    boots = [json.loads((out / "devices" / d["id"] / "counters.json").read_bytes())["boot"] for d in report["devices"]]
    assert boots == [2, 2, 2, 2]
    rounds = [(entry["job"], entry["stage"], entry["round"]) for entry in report["devices"][0]["history"]]
    assert len(rounds) == len(set(rounds))
    assert processes_of(out) == []


def test_the_report_holds_what_was_measured(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = finished
    (backbone,) = report["backbones"]
    assert backbone["sha256_before"] == backbone["sha256_after"]
    assert len(backbone["sha256_before"]) == 64
    assert report["transport"]["protocol"] == 5
    assert "rumqttd" in report["transport"]["broker"]
    assert set(report["summary"]["accuracy"]) == ACCURACIES
    assert (report["seed"], report["seconds"] > 0) == (0, True)
    assert len({device["profile"] for device in report["devices"]}) == len(report["devices"]) == 4
    for device in report["devices"]:
        assert set(device["accuracy"]) == ACCURACIES
        assert all(0 <= value <= 1 for value in device["accuracy"].values())
        assert 50 < device["peak_mib"] <= device["budget_mib"]
        assert len(device["cpu_s"]) == len(device["blocks_active"]) == 3
        assert device["blocks_total"] == 6
        assert min(device["bytes_up"], device["bytes_down"]) > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(device["id"] in page for device in report["devices"])


def test_a_finished_run_is_left_alone(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = finished
    code, output = end(demo(out, *FEW))
    assert code == 18
    assert str(out / "report.html") in output.replace("\n", "")
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report


def test_other_options_do_not_go_on_with_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"seed": 1}))
    code, output = end(demo(tmp_path, *FEW, "--seed", "2"))
    assert code == 18
    assert "seed" in output
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_did_not_get_as_far_as_its_pack_may_start_with_other_options(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.claim({"backbone": "models/broken", "seed": 0})
    assert not folder.claim({"backbone": "models/sound", "seed": 0})
    assert folder.claim({"backbone": "models/sound", "seed": 0})
    folder.pack.mkdir()
    with pytest.raises(RunFolderError, match="another backbone"):
        folder.claim({"backbone": "models/other", "seed": 0})
    assert folder.claim({"backbone": "models/sound", "seed": 0})


def test_without_a_terminal_every_round_has_a_line(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, output = finished
    assert re.search(rf"^{re.escape(str(out))}: goes on", output.replace("\n", ""))
    lines = re.findall(r"^ *\d+:\d\d  ([a-z-]+): (\w+), round (\d+) of \d+", output, re.MULTILINE)
    rounds = [(entry["job"], entry["stage"], str(entry["round"])) for entry in report["devices"][0]["history"]]
    assert lines == rounds[-len(lines) :]
    assert len(lines) >= 4  # what is left after the interruption, each once


def test_a_fleet_trains_a_vision_transformer_on_pictures(tmp_path: Path) -> None:
    code, output = end(demo(tmp_path / "run", *FEW, "--task", "images", "--job", "fedms"))
    assert code == 0, output
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    (backbone,) = report["backbones"]
    assert backbone["architecture"] == "dinov2"
    assert backbone["sha256_before"] == backbone["sha256_after"]
    assert report["data"]["classes"] == 10
    assert [device["blocks_total"] for device in report["devices"]] == [12] * 4
    assert set(report["summary"]["accuracy"]) == {"global_expert", "local_expert", "mixture"}
    first, last = (entry["loss"] for entry in report["devices"][2]["history"] if "loss" in entry and entry["round"] < 3)
    assert last < first


def test_the_readmes_first_command_keeps_its_promises(tmp_path: Path) -> None:
    """All defaults: the one long test, about two minutes."""
    code, output = end(demo(tmp_path / "demo"), timeout=900)
    assert code == 0, output
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert report["summary"]["inside_memory_budget"]
    depths = [max(device["blocks_active"]) for device in report["devices"]]
    assert len(set(depths)) >= 3
    assert min(depths) < max(depths) == report["settings"]["max_depth"]
    bounds = [device["plan"]["bound_by"] for device in report["devices"]]
    assert "cpu" in bounds
    assert any("memory" in bound for bound in bounds)
    means = report["summary"]["accuracy"]
    assert means["mixture"] > means["frozen_head"] > 0.6
    assert means["mixture"] > means["standalone"]
