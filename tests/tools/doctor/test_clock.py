"""The clock: one that lost the time, and one that may lose it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fleetune.edge.resources.probes.clock import read_clock
from fleetune.tools.doctor.clock import CLOCK, check_clock
from support.trees import plant, sample

DATED = "/var/lib/systemd/timesync/clock"
YEAR = 365.25 * 86400


def test_a_clock_behind_what_the_system_wrote_down_is_a_failure(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36") | {DATED: ""})
    later = time.time() + YEAR
    os.utime(tree.path(DATED), (later, later))
    found = check_clock(read_clock(tree))
    assert (found.verdict, found.code) == ("failure", CLOCK)
    assert (
        f"is behind the newest date that is known here, {time.strftime('%Y-%m-%d', time.gmtime(later))}" in found.found
    )
    assert "TLS would fail" in found.found
    assert "timedatectl" in found.fix


def test_the_date_of_a_board_that_starts_without_a_battery_is_a_failure(tmp_path: Path) -> None:
    found = check_clock(read_clock(plant(tmp_path, sample("orin-nano-r36")), now_s=0.0))
    assert found.code == CLOCK
    assert found.found.startswith("1970-01-01 00:00 is behind")


def test_a_clock_far_ahead_is_a_failure(tmp_path: Path) -> None:
    found = check_clock(read_clock(plant(tmp_path, sample("orin-nano-r36")), now_s=time.time() + 20 * YEAR))
    assert found.code == CLOCK
    assert "ten years after" in found.found


def test_a_synchronised_clock_with_a_chip_is_ok(tmp_path: Path) -> None:
    found = check_clock(read_clock(plant(tmp_path, sample("orin-nano-r36"))))
    assert (found.verdict, found.fix) == ("ok", "")


def test_one_that_nobody_vouches_for_is_noted_with_what_a_power_cut_does(tmp_path: Path) -> None:
    found = check_clock(read_clock(plant(tmp_path, sample("jetson-nano-r32"))))
    assert found.verdict == "note"
    assert "nothing says whether it is synchronised" in found.found
    assert "without a battery" in found.found
    assert "set-ntp" in found.fix


def test_a_board_without_a_clock_chip_is_noted_even_while_it_is_right(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/run/systemd/timesync/synchronized": ""})
    found = check_clock(read_clock(tree))
    assert found.verdict == "note"
    assert "no clock chip" in found.found
    assert found.fix == ""
