"""``fleetune profile`` and ``fleetune plan``, as commands, on a tiny pack that is really measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.pack.pack import Pack
from fleetune.profiles.profile import read_profile

TRIALS = 20


def fleetune(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleetune.tools.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def measured(tiny_bert_pack: Pack, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A profile that the command wrote, and what it printed."""
    out = tmp_path_factory.mktemp("profile") / "cam.yaml"
    options = ("--data", text_data, "--threads", "1", "--board", "x86-64", "--memory", "64MiB", "--json")
    done = fleetune("profile", "--pack", tiny_bert_pack.path, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert f"measures: {TRIALS} of {TRIALS}" in done.stderr
    return out, json.loads(done.stdout)


def test_the_profile_holds_the_trials_beside_what_is_declared(measured: tuple[Path, Any], tiny_bert_pack: Pack) -> None:
    file, printed = measured
    profile = read_profile(str(file))
    assert (profile.name, profile.board) == ("cam", read_profile("x86-64").board)
    (found,) = profile.measured
    assert found.costs.pack == tiny_bert_pack.sha256
    assert len(found.costs.trials) == TRIALS
    assert {(trial.depth, trial.recompute) for trial in found.costs.trials} >= {(1, False), (1, True), (3, False)}
    assert printed["measured"]["costs"]["threads"] == 1
    assert {cell["depth"] for cell in printed["table"]} == {1, 2, 3}
    assert all(40 < cell["peak_mib"] < 200 for cell in printed["table"])
    assert printed["errors"]["peak"][0] < 0.05


def test_measuring_again_takes_the_place_of_what_was_measured(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, tmp_path: Path
) -> None:
    file = tmp_path / "cam.yaml"
    file.write_text(measured[0].read_text())
    for threads, tables in (("1", 1), ("2", 2)):
        done = fleetune("profile", "--pack", tiny_bert_pack.path, "--out", file, "--length", "8", "--threads", threads)
        assert done.returncode == 0, done.stderr
        assert len(read_profile(str(file)).measured) == tables
    assert "holds 2 tables of this pack" in done.stderr
    assert "samples of 8 tokens" in done.stdout
    longest = max(trial.length for trial in read_profile(str(measured[0])).measured[0].costs.trials)
    assert [table.costs.length for table in read_profile(str(file)).measured] == [longest, 8]


def test_the_picture_and_the_table_come_from_the_profile_alone(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'fleetune[server]'")
    picture = tmp_path / "cam.png"
    done = fleetune(
        *("profile", "--pack", tiny_bert_pack.path, "--show", measured[0], "--memory", "1MiB", "--picture", picture)
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"^ +3 +recomputed +\[\d+\]", done.stdout, re.MULTILINE)  # above the budget


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--length", "0"), 10, "--length: 0 is out of range"),
        (("--length", "999"), 10, "--length: 999 is out of range"),
        (("--memory", "64"), 10, "--memory: '64'"),
        (("--threads", "-1"), 10, "--threads: -1"),
        (("--picture", "cam.doc"), 10, "--picture: cam.doc"),
        (("--picture", "nowhere/cam.png"), 10, "--picture: nowhere/cam.png cannot be written"),
        (("--out", "nowhere/cam.yaml"), 10, "--out: nowhere/cam.yaml cannot be written"),
        (("--out", "/"), 10, "--out: / cannot be written"),
        (("--board", "jetson-banana"), 10, "'jetson-banana' is unknown"),
        (("--board", "jetson-nano-2gb"), 10, "the profile jetson-nano-2gb says 2GiB"),
    ],
)
def test_a_wrong_option_is_named(
    tiny_bert_pack: Pack, tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    done = fleetune("profile", "--pack", tiny_bert_pack.path, "--out", tmp_path / "cam.yaml", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert not (tmp_path / "cam.yaml").exists()


# --- fleetune plan --------------------------------------------------------------------------------------------------


def plan(file: Path, pack: Pack, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return fleetune("plan", "--profile", file, "--pack", pack.path, "--batch", "4", *options)


def test_a_plan_without_limits_is_as_deep_as_the_job(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, text_data: Path
) -> None:
    done = plan(measured[0], tiny_bert_pack, "--data", text_data, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plan"]["depth"] == 3
    assert found["plan"]["bound_by"] == "job"
    assert found["budget"] == {}
    values = sum(tensor.size for tensor in Expert(Layout.of(tiny_bert_pack.manifest, 2)).active(3).values())
    assert found["bytes_up"] == found["bytes_down"] > values * 2.5 / 8  # bits a value of noise in int4, compressed
    assert plan(measured[0], tiny_bert_pack, "--data", text_data, "--threads", "1").returncode == 0
    assert (
        "measured with 1 threads, not 2"
        in plan(measured[0], tiny_bert_pack, "--data", text_data, "--threads", "2").stderr
    )
    shallow = json.loads(plan(measured[0], tiny_bert_pack, "--data", text_data, "--max-depth", "1", "--json").stdout)
    assert shallow["plan"]["depth"] == 1
    assert shallow["bytes_up"] < found["bytes_up"]


def test_every_plan_that_is_rejected_says_what_it_lacks(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, text_data: Path
) -> None:
    whole = json.loads(plan(measured[0], tiny_bert_pack, "--data", text_data, "--json", "--all").stdout)
    peaks = [option["plan"]["peak_mib"] * 1.1 for option in whole["options"]]
    budget = (min(peaks) + max(peaks)) / 2
    options = ("--data", text_data, "--what-if", f"memory={budget:.2f}MiB")
    found = json.loads(plan(measured[0], tiny_bert_pack, *options, "--json", "--all").stdout)
    for option in found["options"]:
        lack = option["plan"]["peak_mib"] * 1.1 - budget
        assert option["lacks"].get("memory", 0.0) == pytest.approx(max(0.0, lack), abs=0.01)
    assert found["plan"]["peak_mib"] * 1.1 <= budget
    text = plan(measured[0], tiny_bert_pack, *options, "--all").stdout
    assert len(re.findall(r"^ .*\d MiB$", text, re.MULTILINE)) == sum(bool(o["lacks"]) for o in found["options"])


def test_a_budget_below_one_block_is_refused_with_what_is_missing(
    measured: tuple[Path, Any], tiny_bert_pack: Pack
) -> None:
    done = plan(measured[0], tiny_bert_pack, "--samples", "20", "--length", "8", "--what-if", "memory=8MiB")
    assert done.returncode == 14
    assert re.search(r"one active block needs \d+ MiB, \d+ MiB more than the 8 MiB given", done.stderr)
    assert "depth" in done.stdout


def test_a_deadline_is_a_limit_of_seconds(measured: tuple[Path, Any], tiny_bert_pack: Pack) -> None:
    options = ("--samples", "2000", "--length", "8", "--epochs", "50", "--json")
    free = json.loads(plan(measured[0], tiny_bert_pack, *options).stdout)
    late = plan(measured[0], tiny_bert_pack, *options, "--deadline", str(free["plan"]["seconds"]))
    found = json.loads(late.stdout)
    assert found["budget"] == {"deadline_s": free["plan"]["seconds"]}
    assert found["plan"] is None or found["plan"]["seconds"] * 1.15 <= free["plan"]["seconds"]


def test_a_fleet_is_one_table_and_a_device_without_trials_says_so(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, tmp_path: Path
) -> None:
    (tmp_path / "cam.yaml").write_text(measured[0].read_text())
    (tmp_path / "blind.yaml").write_text(re.sub(r", watts: [0-9.]+", "", measured[0].read_text()))
    fleet = tmp_path / "fleet.yaml"
    devices = (
        "  - {id: cam-01, profile: ./cam.yaml, budget: {memory: 500MiB}}\n"
        "  - {id: cam-02, profile: ./cam.yaml, budget: {memory: 9MiB}}\n"
        "  - {id: pi-1, profile: raspberry-pi-5, budget: {memory: 500MiB}}\n"
        "  - {id: pi-2, profile: ./blind.yaml, budget: {memory: 500MiB, joules: 5}}\n"
    )
    fleet.write_text(f"schema: 1\nfleet: lab\ndevices:\n{devices}")
    options = ("--fleet", fleet, "--pack", tiny_bert_pack.path, "--samples", "20", "--batch", "4", "--length", "8")
    done = fleetune("plan", *options)
    assert done.returncode == 14
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert re.match(r"cam-01 +3 +(kept|recomputed) +4 ", rows["cam-01"])
    assert "no plan" in rows["cam-02"]
    assert "more than the 9 MiB given" in rows["cam-02:"]
    assert "holds no trials that count" in rows["pi-1:"]
    assert "no sensor of this device measures energy" in rows["pi-2:"]
    one = fleetune("plan", *options, "--id", "cam-01", "--json")
    assert one.returncode == 0
    assert json.loads(one.stdout)["budget"] == {"memory_mib": 500.0}
    assert [each["device"] for each in json.loads(fleetune("plan", *options, "--json").stdout)] == [
        *("cam-01", "cam-02", "pi-1", "pi-2")
    ]
    assert fleetune("plan", *options, "--id", "pi-1").returncode == 10


def test_a_table_of_another_kit_or_of_shorter_samples_does_not_count(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, tmp_path: Path
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(re.sub(r"kit: \S+", "kit: 0.0.1", measured[0].read_text()))
    done = plan(old, tiny_bert_pack, "--samples", "20", "--length", "8")
    assert done.returncode == 10
    assert "measured with kit 0.0.1, this is" in done.stderr
    done = plan(measured[0], tiny_bert_pack, "--samples", "20", "--length", "16")
    assert done.returncode == 10
    assert re.search(r"measured up to \d+ tokens, a sample has 16", done.stderr)
    assert "fleetune profile" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--samples", "0"), "--samples: 0"),
        (("--samples", "20", "--length", "99"), "--length: 99"),
        (("--samples", "20", "--epochs", "0"), "--epochs: 0"),
        (("--samples", "20", "--max-depth", "4"), "--max-depth: 4"),
        (("--samples", "20", "--classes", "1"), "--classes: 1"),
        (("--samples", "20", "--what-if", "speed=3"), "--what-if: 'speed=3' is no limit"),
        (("--samples", "20", "--what-if", "memory=3"), "--what-if memory: '3'"),
        (("--samples", "20", "--what-if", "joules=-3"), "--what-if joules: '-3'"),
        (("--samples", "20", "--deadline", "nan"), "--what-if seconds: 'nan'"),
        (("--samples", "20", "--id", "cam-01"), "--id: cam-01"),
        (("--samples", "20", "--deadline", "9", "--what-if", "seconds=5"), "--what-if: seconds is given twice"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    measured: tuple[Path, Any], tiny_bert_pack: Pack, options: tuple[str, ...], words: str
) -> None:
    done = plan(measured[0], tiny_bert_pack, *options)
    assert done.returncode == 10
    assert words in done.stderr


def test_energy_without_a_sensor_is_refused(measured: tuple[Path, Any], tiny_bert_pack: Pack, tmp_path: Path) -> None:
    blind = tmp_path / "blind.yaml"
    blind.write_text(re.sub(r", watts: [0-9.]+", "", measured[0].read_text()))
    done = plan(blind, tiny_bert_pack, "--samples", "20", "--length", "8", "--what-if", "joules=5")
    assert done.returncode == 14
    assert "no sensor of this device measures energy" in done.stderr
    seeing = tmp_path / "seeing.yaml"
    seeing.write_text(re.sub(r"(forward_cpu_s: [^}]+)}", r"\1, watts: 5.0}", blind.read_text()))
    found = json.loads(plan(seeing, tiny_bert_pack, "--samples", "20", "--length", "8", "--json").stdout)
    assert found["plan"]["joules"] == pytest.approx(5 * found["plan"]["seconds"])
