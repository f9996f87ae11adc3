"""The clock: sane, behind what we know for sure, or far ahead."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fleetune.edge.resources.probes import clock as module
from fleetune.edge.resources.probes.clock import AHEAD_LIMIT_S, read_clock
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample


def test_this_machine() -> None:
    tree = Tree()
    clock = read_clock(tree)
    assert clock.now_s == pytest.approx(time.time(), abs=5)
    assert clock.sane
    assert clock.behind_s == 0
    assert clock.newest_known_s >= Path(module.__file__).stat().st_mtime
    assert clock.synchronised in (True, False)  # the kernel tells, whatever it says
    assert tree.skipped == ()


def test_a_clock_that_starts_at_its_epoch_is_behind(tmp_path: Path) -> None:
    clock = read_clock(Tree(tmp_path), now_s=1e9)
    assert not clock.sane
    assert clock.behind_s == clock.newest_known_s - 1e9


@pytest.mark.parametrize(("after", "sane"), [(0, True), (AHEAD_LIMIT_S, True), (AHEAD_LIMIT_S + 1, False), (-1, False)])
def test_a_clock_far_ahead_is_not_sane(after: float, sane: bool, tmp_path: Path) -> None:
    known = read_clock(Tree(tmp_path)).newest_known_s
    assert read_clock(Tree(tmp_path), now_s=known + after).sane is sane


@pytest.mark.parametrize("record", ["/var/lib/systemd/timesync/clock", "/usr/lib/clock-epoch"])
def test_what_systemd_has_recorded_counts(record: str, tmp_path: Path) -> None:
    tree = plant(tmp_path, {record: ""})
    later = time.time() + 86400
    os.utime(tree.path(record), (later, later))
    clock = read_clock(tree)
    assert clock.newest_known_s == pytest.approx(later)
    assert clock.behind_s == pytest.approx(86400, abs=60)


@pytest.mark.parametrize(("board", "rtc", "synchronised"), [
    ("jetson-nano-r32", True, None), ("orin-nano-r36", True, True), ("vm-x86-64", False, None),
])  # fmt: skip
def test_boards(board: str, rtc: bool, synchronised: bool | None, tmp_path: Path) -> None:
    """The kernel of this machine is not asked about another one's clock."""
    clock = read_clock(plant(tmp_path, sample(board)))
    assert (clock.rtc, clock.synchronised) == (rtc, synchronised)
