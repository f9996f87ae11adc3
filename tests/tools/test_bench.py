"""Benchmarks: what a figure says, and a whole run of the one that trains, without its peers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFailedError, RunFolderError
from fleetune.edge.protocol.files import FolderLock
from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import measure
from fleetune.tools.assets import cache_root
from fleetune.tools.bench.figures import Document, Target, figure
from fleetune.tools.bench.training.round_worker import RoundSpec
from fleetune.tools.bench.training.workers import Worker, round_command


def test_a_figure_is_the_median_with_its_range() -> None:
    found = figure("step", "s", [3.0, 1.0, 2.0])
    assert (found.value, found.spread, found.ratio, found.met) == (2.0, (1.0, 3.0), None, None)


def test_less_is_better_where_the_target_says_so() -> None:
    found = figure("peak", "MiB", [100.0], peer="p", peer_values=[700.0], target=Target(1 / 6, lower=True))
    assert found.ratio == pytest.approx(1 / 7, abs=1e-4)
    assert (found.target, found.met) == ("≤ 0.167", True)
    assert not figure("peak", "MiB", [120.0], peer="p", peer_values=[700.0], target=Target(1 / 6, lower=True)).met


def test_a_speed_up_is_how_many_times_faster_it_is() -> None:
    found = figure("epoch", "s", [2.0], peer="p", peer_values=[6.0], target=Target(3.8, lower=False))
    assert (found.ratio, found.target, found.met) == (3.0, "≥ 3.8", False)


def test_without_a_peer_the_value_itself_is_judged() -> None:
    assert figure("share", "", [0.8], target=Target(0.75, lower=False)).met
    assert not figure("share", "", [0.7], target=Target(0.75, lower=False)).met


def test_every_document_has_the_same_shape() -> None:
    document = Document("step", (figure("step", "s", [1.0]),), {"torch": "2"}).as_json()
    assert document.keys() == {"bench", "environment", "figures", "notes"}
    assert {"cpu", "cores", "load", "peers"} <= document["environment"].keys()
    assert document["figures"][0].keys() == {
        "name", "value", "unit", "spread", "peer", "peer_value", "ratio", "target", "met",
    }  # fmt: skip


def test_a_worker_answers_in_turn(tmp_path: Path) -> None:
    code = (
        "import sys, json\nprint('noise')\nprint(json.dumps({'ready': 1}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'did': json.loads(line)['do']}), flush=True)"
    )
    with Worker("echo", [sys.executable, "-c", code], tmp_path / "log") as worker:
        assert worker.ready == {"ready": 1}
        assert [worker.ask("a"), worker.ask("b")] == [{"did": "a"}, {"did": "b"}]
        assert 0 < worker.started_s < 30


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; sys.exit('no such model')"
    with pytest.raises(RunFailedError, match="torch ended with exit code 1: no such model") as caught:
        Worker("torch", [sys.executable, "-c", code], tmp_path / "log")
    assert str(tmp_path / "log") in caught.value.remedy


def test_a_round_runs_as_an_agents_without_a_broker(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> None:
    costs = measure(tiny_bert_pack, threads=1, longest=int(read_dataset(text_data, tiny_bert_pack).lengths.max()))
    (tmp_path / "costs.json").write_bytes(encode(costs))

    def ask(memory_mib: float) -> dict[str, Any]:
        spec = RoundSpec(
            pack=str(tiny_bert_pack.path),
            data=str(text_data),
            costs=str(tmp_path / "costs.json"),
            state=str(tmp_path / "agent"),
            memory_mib=memory_mib,
            threads=1,
            epochs=2,
            group="",
        )
        with Worker("a round", round_command(tmp_path, spec), tmp_path / "log") as worker:
            return worker.ask("round")

    found = ask(1000.0)
    assert found["waits"] == ""
    assert (found["depth"], found["stopped_for"], found["eased"]) == (3, "", 0)
    assert found["tensors"] > 0
    with pytest.raises(RunFailedError, match=r"more than the 20 MiB given"):
        ask(20.0)


Figures = dict[str, dict[str, Any]]


def quick_run(name: str, folder: Path, *more: str) -> tuple[Figures, str]:
    """The figures by their names, and what was printed."""
    pytest.importorskip("rich", reason="the table needs rich: pip install 'fleetune[all]'")
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "fleetune.tools.cli", "bench", name, "--quick", *more, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    return {item["name"]: item for item in json.loads(out.read_text(encoding="utf-8"))["figures"]}, done.stdout


def test_a_quick_run_measures_and_learns(minilm: Path, tmp_path: Path) -> None:
    del minilm  # in the cache by now
    figures, said = quick_run("step", tmp_path, "--peers", "none")
    assert 60 < figures["MiniLM: peak memory"]["value"] < 250
    # How long it took says nothing beside other tests.
    assert all(figures[f"MiniLM: {which} epoch"]["value"] > 0 for which in ("first", "later"))
    share = figures["MiniLM: share of the arithmetic limit"]
    assert share["value"] > 0
    assert share["met"] == (share["value"] >= 0.75)
    assert "share of" in said


def test_a_quick_run_trains_a_mixture_as_torch_does(tmp_path: Path) -> None:
    found, _ = quick_run("mixture", tmp_path)
    figures = {name.split(": ")[1]: item for name, item in found.items()}
    assert figures["loss of the last step"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert figures["loss of the last step"]["value"] < 2.5  # ten classes by chance: 2.303
    assert figures["peak memory"]["ratio"] < 0.5
    assert figures["a step"]["value"] > 0


def test_a_quick_run_has_live_agents_and_injected_updates(tmp_path: Path) -> None:
    figures, _ = quick_run("fleet", tmp_path)
    assert 0 < figures["50 live agents, 4 KiB each way: a round"]["value"] < 60
    assert figures["500 injected updates a round, 10 KiB each: updates a second"]["value"] > 10


def test_a_quick_run_answers_with_a_mixture(minilm: Path, tmp_path: Path) -> None:
    del minilm
    figures, _ = quick_run("infer", tmp_path, "--peers", "none")
    name, mixture = next(iter(figures.items()))
    assert name == "MiniLM: a mixture's answer, sample by sample in turns"
    assert mixture["ratio"] > 0
    assert mixture["met"] == (mixture["ratio"] <= 1.35)


def test_two_benchmarks_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path))
    with closing(FolderLock(cache_root() / "bench")):
        command = [sys.executable, "-m", "fleetune.tools.cli", "bench", "infer", "--peers", "none"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == RunFolderError.exit_code
    assert "would measure each other" in done.stderr


def test_privacy_is_measured_with_the_devices_own_mechanism(tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")
    from fleetune.tools.bench.learning import privacy

    extent = privacy.Extent((0,), fleets=(2, 4), both=4, epsilons=(math.inf, 0.01), rounds=(1, 1), train=16, test=8)
    document = privacy.run(extent, tiny_dinov2_pack, tmp_path, 1, lambda _what: None)
    found = {item.name: item for item in document.figures}
    for fleet in ("2 devices, one factor", "4 devices, one factor", "4 devices, both factors"):
        for expert in ("global expert", "mixture"):
            assert 0 <= found[f"{fleet}, no noise: {expert}"].value <= 1
            assert found[f"{fleet}, ε 0.01: {expert}"].peer_value == found[f"{fleet}, no noise: {expert}"].value
    for devices in (2, 4):
        assert 0 <= found[f"{devices} devices, each alone: head on the frozen backbone"].value <= 1
    seen = [found[f"{devices} devices, one factor, ε 0.01: ε against the aggregator"].value for devices in (2, 4)]
    assert 0.01 < seen[0] < seen[1]  # the more share the noise, the less of it each has
    assert (tmp_path / "privacy.png").stat().st_size > 10_000
