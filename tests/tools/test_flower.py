"""Flower as a peer: its processes leave nothing behind, and its answers are read with care."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from fleetune.edge.protocol.errors import AssetError, RunFailedError
from fleetune.tools.assets import cache_root
from fleetune.tools.bench.peers import FLOWER, Peers, peers_python
from fleetune.tools.bench.transfer import flower
from fleetune.tools.bench.transfer.flower import Processes, flower_idle, flower_rounds, lora_matrices, read_ends

TREE = """
import subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True)]
print(*(child.pid for child in children), flush=True)
time.sleep(float(sys.argv[1]))
"""
"""Starts two processes, one of them in a session of its own, as Flower's SuperLink and SuperNode do."""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def start_trees(running: Processes, folder: Path) -> list[int]:
    """One tree stands, of the other the parent has ended."""
    running.start("stands", "python", "-c", TREE, "600")
    running.start("fell", "python", "-c", TREE, "0")
    for name in ("stands", "fell"):
        running.await_text(name, "\n")
    pids = [int(word) for name in ("stands", "fell") for word in (folder / f"{name}.txt").read_text().split()]
    assert len(pids) == 4
    assert all(is_running(pid) for pid in pids)
    return pids


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_an_error(error: type[BaseException], tmp_path: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with Processes(Path(sys.executable), tmp_path) as running:
            pids.extend(start_trees(running, tmp_path))
            pids.extend(process.pid for process in running.family("stands"))
            raise error

    with pytest.raises(error):
        fail()
    assert len(set(pids)) == 5
    assert not any(is_running(pid) for pid in pids)


def test_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with Processes(Path(sys.executable), tmp_path / "one") as ours:
        ours.start("waits", "python", "-c", "import time; time.sleep(600)")
        (first,) = ours.family("waits")
        with Processes(Path(sys.executable), tmp_path / "two") as theirs:
            theirs.start("waits", "python", "-c", "import time; time.sleep(600)")
            (second,) = theirs.family("waits")
        assert is_running(first.pid)
        assert not is_running(second.pid)


def test_processes_that_fill_the_memory_are_ended_before_the_kernel_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Processes(Path(sys.executable), tmp_path) as running:
        running.start("waits", "python", "-c", "import time; time.sleep(600)")
        running.check()
        monkeypatch.setattr(flower, "_SPARE", 1.0)  # all of it
        with pytest.raises(RunFailedError, match="MiB of the machine's memory free"):
            running.check()


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Processes(Path(sys.executable), tmp_path) as running:
        running.start("device-3", "python", "-c", "import sys; sys.exit('no such app')")
        with pytest.raises(RunFailedError, match="Flower's device-3 ended with exit code 1: no such app") as caught:
            running.await_text("device-3", "never")
    assert str(tmp_path / "device-3.txt") in caught.value.remedy


def test_flower_reaches_for_no_network_but_loopback(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps({name: os.environ.get(name) for name in %r}))"
    names = ["FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "no_proxy"]
    with Processes(Path(sys.executable), tmp_path) as running:
        running.start("prints", "python", "-c", code % names)
        running.await_text("prints", "}")
    found = json.loads((tmp_path / "prints.txt").read_text(encoding="utf-8"))
    assert list(found.values()) == ["0", "1", "127.0.0.1"]


def test_a_line_that_is_being_written_is_no_end_yet(tmp_path: Path) -> None:
    (tmp_path / "ends.txt").write_text("100.5\n107.25\n11", encoding="utf-8")
    assert read_ends(tmp_path / "ends.txt") == [100.5, 107.25]


def test_a_failed_round_is_no_quick_round(tmp_path: Path) -> None:
    (tmp_path / "ends.txt").write_text("100.5\nerror: RuntimeError('a device failed')\n", encoding="utf-8")
    with pytest.raises(RunFailedError, match="a device failed") as caught:
        read_ends(tmp_path / "ends.txt")
    assert str(tmp_path) in caught.value.remedy


def test_the_payload_is_that_of_lora_and_no_matrix_twice() -> None:
    matrices = lora_matrices()
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices) == 48
    assert sum(matrix.nbytes for matrix in matrices) == 1_179_648
    assert {matrix.shape for matrix in matrices} == {(8, 768), (768, 8)}
    assert {matrix.dtype for matrix in matrices} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_an_environment_that_pip_did_not_finish_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.txt").write_text(f"{tmp_path / 'no-such-folder'}\n", encoding="utf-8")
    peers, said = Peers(tmp_path / "broken.txt", "7 MB", ("nothing",)), []
    for _ in range(2):
        with pytest.raises(AssetError, match="cannot be installed"):
            peers_python(said.append, peers)
    assert len(said) == 2
    assert "7 MB" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
def test_flower_does_rounds_and_waits(streams: bool, tmp_path: Path) -> None:
    if not any((folder / "bin" / "flwr").exists() for folder in (cache_root() / "peers").glob("*")):
        pytest.skip("Flower is not installed: `fleetune bench round` does it")
    python = peers_python(lambda _: None, FLOWER)
    matrices = lora_matrices(blocks=1)
    start = time.monotonic()
    found = flower_rounds(
        python, tmp_path / "rounds", devices=2, rounds=2, tensors=matrices, streams=streams, say=lambda _: None
    )
    assert len(found) == 2
    assert 0 < sum(found) < time.monotonic() - start
    idle = flower_idle(python, tmp_path / "idle", streams=streams)
    assert 30 < idle.uss_mib < idle.pss_mib < idle.rss_mib < 1000
