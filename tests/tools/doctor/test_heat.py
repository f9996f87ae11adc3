"""Heat and power: what slows a board down, and that none of it is a failure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.machine import probe
from fleetune.tools.doctor.heat import check_heat
from fleetune.tools.doctor.host import Check
from support.trees import plant, sample

SUPPLY = "/sys/class/power_supply/BAT0"


def check(root: Path, board: str, files: Mapping[str, str] | None = None) -> Check:
    plant(root, sample(board) | dict(files or {}))
    return check_heat(probe(root))


def battery(status: str) -> dict[str, str]:
    values = {"type": "Battery", "status": status, "capacity": "55", "energy_now": "10000000", "power_now": "5000000"}
    return {f"{SUPPLY}/{name}": value for name, value in values.items()}


def test_a_power_mode_that_switches_cores_off_is_noted_with_the_way_out(tmp_path: Path) -> None:
    found = check(tmp_path, "jetson-nano-r32")
    assert (found.verdict, found.code) == ("note", 0)
    assert "power mode 5W" in found.found
    assert "2 of 4 cores are on" in found.found
    assert "nvpmodel -m 0" in found.fix


def test_a_cool_board_with_all_cores_is_ok(tmp_path: Path) -> None:
    found = check(tmp_path, "orin-nano-r36")
    assert (found.verdict, found.fix) == ("ok", "")
    assert "49 °C, 50 °C below the first limit" in found.found


def test_a_board_that_is_slowed_down_now_is_noted(tmp_path: Path) -> None:
    zone = "/sys/class/thermal/thermal_zone0"
    hot = {f"{zone}/temp": "99500", f"{zone}/trip_point_0_type": "passive", f"{zone}/trip_point_0_temp": "99000"}
    found = check(tmp_path, "orin-nano-r36", hot)
    assert found.verdict == "note"
    assert "slowed down now" in found.found
    assert "cool it" in found.fix


@pytest.mark.parametrize(("bits", "words"), [("50005", "the supply is too weak"), ("50000", "since it started")])
def test_a_weak_supply_is_noted_now_and_afterwards(bits: str, words: str, tmp_path: Path) -> None:
    files = sample("raspberry-pi-5")
    place = next(path for path in files if path.endswith("get_throttled"))
    found = check(tmp_path, "raspberry-pi-5", {place: bits})
    assert found.verdict == "note"
    assert words in found.found
    assert "supply" in found.fix


def test_a_battery_that_empties_is_noted_and_one_that_is_full_is_not(tmp_path: Path) -> None:
    empties = check(tmp_path / "empties", "orin-nano-r36", battery("Discharging"))
    assert empties.verdict == "note"
    assert "battery BAT0 55 %, discharging, 120 minutes left" in empties.found
    full = check(tmp_path / "full", "orin-nano-r36", battery("Full"))
    assert full.verdict == "ok"
    assert "battery BAT0 55 %, full" in full.found


def test_a_machine_without_sensors_is_ok(tmp_path: Path) -> None:
    found = check_heat(probe(tmp_path))
    assert (found.verdict, found.found) == ("ok", "no temperature to be read")
