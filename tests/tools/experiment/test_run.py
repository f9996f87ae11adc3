"""``fleetune experiment``: what is kept, what is reported, and what is refused before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[all]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'fleetune[all]'")

from fleetune.tools.experiment.report import Row, grid, rows
from fleetune.tools.experiment.run import ABLATIONS, METHODS, Case, Record, Setting, models
from fleetune.tools.pack.extractors import CNNS

SETTING = Setting("fashion-mnist", 4, 1.0, 3, "mixed", 100, 0.3, 1, 64, 0.05)


def experiment(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleetune.tools.cli", "experiment", "pfedmoe", "--quick", "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def record(method: str, seed: int, *accuracy: float) -> Record:
    sent, flops, seconds = ([scale * r for r in range(1, len(accuracy) + 1)] for scale in (10, 1e9, 0.5))
    return Record(Case("s", seed, method), list(accuracy), [int(one) for one in sent], flops, seconds)


# --- a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("experiment") / "run"
    done = experiment(out, "--methods", "pfedmoe,standalone", "--split", "pathological")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_a_table_a_picture_and_its_figures(finished: tuple[Path, str]) -> None:
    out, printed = finished
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in results["rows"]] == ["pfedmoe", "standalone"]
    assert all(len(run["accuracy"]) == 3 for run in results["runs"])
    assert results["runs"][0]["sent"][0] == 10 * 2 * 665_048
    assert results["runs"][1]["sent"] == [0, 0, 0]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "standalone" in printed
    assert "standalone" in (out / "table.md").read_text(encoding="utf-8")


def test_the_same_command_plays_nothing_again(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert len(before) == 2
    done = experiment(out, "--methods", "pfedmoe,standalone", "--split", "pathological", "--json")
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()} == before
    assert json.loads(done.stdout) == json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("options", "what"), [
    (("--methods", "fedsgd"), "fedsgd is unknown"),
    (("--methods", "pfedmoe,fedavg"), "fedavg averages whole models"),
    (("--seeds", "1,1"), "--seeds"),
    (("--fraction", "0"), "--fraction"),
    (("--data", "no-such-folder"), "no-such-folder"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_played(
    options: tuple[str, str], what: str, tmp_path: Path
) -> None:
    done = experiment(tmp_path / "run", *options)
    assert done.returncode not in (0, 1)
    assert what in done.stderr
    assert "remedy" in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_models_are_dealt_in_turn() -> None:
    assert models(SETTING, 7) == [*CNNS.values(), CNNS["cnn-1"], CNNS["cnn-2"]]


def test_the_method_that_all_is_about_comes_first() -> None:
    assert next(iter(METHODS)) == "pfedmoe"
    baselines = {"standalone", "lg-fedavg", "fml", "fedkd", "fedproto", "fedgh", "fd", "fedavg", "fedper", "ditto"}
    assert set(METHODS) == {"pfedmoe", *baselines, *ABLATIONS}


def test_another_gate_is_a_method_of_its_own_that_plays_when_it_is_asked_for(tmp_path: Path) -> None:
    done = experiment(tmp_path, "--methods", "pfedmoe-held-out,pfedmoe-fixed", "--split", "pathological", "--json")
    assert done.returncode == 0, done.stderr
    runs = {run["case"]["method"]: run["accuracy"] for run in json.loads(done.stdout)["runs"]}
    assert runs.keys() == {"pfedmoe-held-out", "pfedmoe-fixed"}
    assert runs["pfedmoe-held-out"] != runs["pfedmoe-fixed"]


# --- the report ---------------------------------------------------------------------------------------------


def test_rows_are_means_over_the_seeds_and_leads_are_seed_by_seed() -> None:
    found = rows([
        record("pfedmoe", 0, 0.5, 0.8, 0.7), record("standalone", 0, 0.4, 0.6, 0.6),
        record("pfedmoe", 1, 0.6, 0.6, 0.9), record("standalone", 1, 0.4, 0.5, 0.8),
    ])  # fmt: skip
    ours, alone = found
    assert (ours.best, ours.last) == pytest.approx((0.85, 0.8))
    assert alone.lead == pytest.approx(-0.15)  # −0.2 and −0.1
    assert alone.lead_spread == pytest.approx(0.0707, abs=1e-3)
    # Stand-alone's best is 0.7: pFedMoE is there after rounds 2 and 3, stand-alone with seed 0 never.
    assert (ours.rounds, ours.sent, ours.gflop, ours.seconds) == pytest.approx((2.5, 25, 2.5, 1.25))
    assert alone.rounds is None


def test_a_table_says_never_where_the_target_was_not_reached() -> None:
    ours = Row("s", "pfedmoe", 0.8, 0, 0.7, 0, 0.75, 0, 0, 2.5, 25e6, 3.0, 1.0)
    found = [ours, Row("s", "x", 0.6, 0, 0.6, 0, 0.75, -0.2, 0.1, None, None, None, None)]
    table = grid("s", found)
    assert "75.0 %" in table.title
    assert table.rows[0][3:6] == ("", "2", "100")
    assert table.rows[1][3:5] == ("-20.0 ± 10.0", "never")


def test_one_seed_has_no_spread() -> None:
    (row,) = grid("s", rows([record("pfedmoe", 0, 0.5, 0.8, 0.7)])).rows
    assert row[1:4] == ("80.0", "70.0", "")
