"""The disk: its room, and a measurement that leaves nothing behind and never fills it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.disk import read_disk, write_speed
from fleetune.edge.resources.probes.tree import Tree

MIB = 1 << 20


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    tree = Tree()
    disk = read_disk(tree, tmp_path / "state" / "cache")
    assert disk is not None
    assert disk.folder == str(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    assert disk.total_mib == pytest.approx(usage.total / MIB)
    assert disk.free_mib == pytest.approx(usage.free / MIB, rel=0.05)
    assert disk.write_mib_per_s is None
    assert tree.skipped == ()


def test_the_speed_is_of_bytes_that_are_written(tmp_path: Path) -> None:
    tree = Tree()
    start = time.monotonic()
    disk = read_disk(tree, tmp_path, write=True)
    seconds = time.monotonic() - start
    assert disk is not None
    assert disk.write_mib_per_s is not None
    assert 16 / seconds <= disk.write_mib_per_s < 1e5
    assert list(tmp_path.iterdir()) == []
    assert tree.skipped == ()


def test_a_slow_disk_is_given_up_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []

    def slow(descriptor: int) -> None:
        syncs.append(os.fstat(descriptor).st_size)
        time.sleep(0.2)

    monkeypatch.setattr(os, "fsync", slow)
    speed = write_speed(Tree(), tmp_path, free_mib=1e6, size_mib=16, at_most_s=0.3)
    assert syncs == [2 * MIB, 4 * MIB]
    assert speed is not None
    assert speed <= 4 / 0.4


def test_a_disk_with_little_room_is_left_alone(tmp_path: Path) -> None:
    tree = Tree()
    assert write_speed(tree, tmp_path, free_mib=527, size_mib=16, reserve_mib=512) is None
    assert tree.skipped == (
        f"{tmp_path}: speed of writing: 527 MiB are free, of which 512 stay free, and 16 are needed",
    )
    assert write_speed(tree, tmp_path, free_mib=528, size_mib=16, reserve_mib=512) is not None


def test_a_folder_that_cannot_be_written_is_named() -> None:
    tree = Tree()
    assert write_speed(tree, Path("/proc"), free_mib=1e6) is None
    assert len(tree.skipped) == 1
    assert tree.skipped[0].startswith("/proc: speed of writing: ")


def test_a_folder_that_cannot_be_looked_at_is_named() -> None:
    tree = Tree()
    assert read_disk(tree, Path("/tmp") / ("x" * 300) / "y") is None  # noqa: S108 - nothing is written
    assert tree.skipped[0].endswith(": file name too long")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(end: signal.Signals, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from fleetune.edge.resources.probes.disk import write_speed
from fleetune.edge.resources.probes.tree import Tree
print("begun", flush=True)
write_speed(Tree(), Path({str(tmp_path)!r}), free_mib=1e6, size_mib=64, at_most_s=60)
while True:
    write_speed(Tree(), Path({str(tmp_path)!r}), free_mib=1e6, size_mib=64, at_most_s=60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(end)
        process.communicate(timeout=30)
        assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []
