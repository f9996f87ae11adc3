"""Heat: a board that throttles waits, and not only until one degree below its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.edge.resources.heat import Heat
from support.trees import thermal_zone


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    return thermal_zone(tmp_path, temperature_c=60, limit_c=97)


def test_it_waits_from_the_limit_on_until_five_degrees_below(zone: Path, tmp_path: Path) -> None:
    heat, hot = Heat(tmp_path), []
    for temperature in (60, 96, 97, 98, 96, 93, 92, 91, 96):
        (zone / "temp").write_text(f"{temperature}000\n")
        hot.append(bool(heat.reason()))
    assert hot == [False, False, True, True, True, True, False, False, False]


def test_the_reason_names_the_sensor_and_its_limit(zone: Path, tmp_path: Path) -> None:
    (zone / "temp").write_text("99000\n")
    assert Heat(tmp_path).reason() == "CPU-therm is at 99 °C and throttles from 97; goes on at 92"


def test_a_board_whose_firmware_throttles_it_waits_too(tmp_path: Path) -> None:
    firmware = tmp_path / "sys" / "devices" / "platform" / "soc" / "soc:firmware"
    firmware.mkdir(parents=True)
    heat = Heat(tmp_path)
    for value, reason in (("0", ""), ("4", "the board throttles"), ("40000", "")):
        (firmware / "get_throttled").write_text(f"{value}\n")
        assert heat.reason() == reason


def test_without_a_trip_point_the_limit_is_the_boards_declared_one(zone: Path, tmp_path: Path) -> None:
    (zone / "trip_point_0_type").unlink()
    (zone / "temp").write_text("99000\n")
    assert Heat(tmp_path).reason() == ""
    heat = Heat(tmp_path, throttles_c=80)
    assert heat.reason() == "CPU-therm is at 99 °C and throttles from 80; goes on at 75"
    (zone / "temp").write_text("76000\n")
    assert heat.reason()
    (zone / "temp").write_text("74000\n")
    assert heat.reason() == ""


def test_without_a_sensor_nothing_waits(tmp_path: Path) -> None:
    assert Heat(tmp_path).reason() == ""
