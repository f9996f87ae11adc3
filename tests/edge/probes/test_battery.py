"""Batteries that power the board: charge, power, and how long they last."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fleetune.edge.resources.probes.battery import Battery, read_batteries
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

FOLDER = "/sys/class/power_supply"


def supply(name: str, **files: str) -> dict[str, str]:
    return {f"{FOLDER}/{name}/{file}": f"{value}\n" for file, value in files.items()}


def test_a_battery_in_watts(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        supply("BAT0", type="Battery", capacity="81", status="Discharging", power_now="7500000", energy_now="30000000"),
    )
    (battery,) = read_batteries(tree)
    assert battery == Battery("BAT0", 81, "Discharging", 7.5, 30)
    assert battery.time_left_s == 4 * 3600
    assert tree.skipped == ()


def test_a_battery_in_amperes(tmp_path: Path) -> None:
    """A gauge that tells current and charge, negative while it discharges."""
    files = {"voltage_now": "7400000", "current_now": "-1000000", "charge_now": "2000000"}
    (battery,) = read_batteries(plant(tmp_path, supply("max170xx", type="Battery", status="Discharging", **files)))
    assert battery.power_w == pytest.approx(-7.4)
    assert battery.energy_left_wh == pytest.approx(14.8)
    assert battery.time_left_s == pytest.approx(2 * 3600)
    assert battery.charge_percent is None


@pytest.mark.parametrize("files", [
    {"status": "Charging", "power_now": "7500000", "energy_now": "1"},
    {"status": "Discharging", "energy_now": "1"},
    {"status": "Discharging", "power_now": "0", "energy_now": "1"},
    {"status": "Discharging", "power_now": "7500000"},
])  # fmt: skip
def test_no_time_is_left_to_tell(files: dict[str, str], tmp_path: Path) -> None:
    (battery,) = read_batteries(plant(tmp_path, supply("BAT0", type="Battery", **files)))
    assert battery.time_left_s is None


def test_other_supplies_are_not_batteries(tmp_path: Path) -> None:
    files = supply("AC", type="Mains", online="1") | supply("mouse", type="Battery", scope="Device", capacity="9")
    assert read_batteries(plant(tmp_path, files)) == ()
    assert read_batteries(plant(tmp_path / "orin", sample("orin-nano-r36"))) == ()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    tree = plant(tmp_path, supply("BAT0", type="Battery", capacity="full", status="Full"))
    assert read_batteries(tree) == (Battery("BAT0", None, "Full", None, None),)
    assert tree.skipped == (f"{FOLDER}/BAT0/capacity: not a number: 'full'",)


def test_this_machine() -> None:
    assert bool(read_batteries(Tree())) == bool(psutil.sensors_battery())
