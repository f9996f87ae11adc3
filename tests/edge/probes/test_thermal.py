"""Heat: how near a board is to slowing down, and whether it does so now."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.edge.resources.probes.thermal import Binding, CoolingDevice, Thermal, Trip, Zone, read_thermal
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

ZONES = "/sys/class/thermal"
CPU_TEMPERATURE = f"{ZONES}/thermal_zone1/temp"
CPU_CLOCK = f"{ZONES}/cooling_device1/cur_state"
THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"


def read(tmp_path: Path, board: str, **changes: str) -> Thermal:
    tree = plant(tmp_path, sample(board) | changes)
    thermal = read_thermal(tree)
    assert tree.skipped == ()
    return thermal


def test_the_nanos_zones(tmp_path: Path) -> None:
    thermal = read(tmp_path, "jetson-nano-r32")
    assert [zone.kind for zone in thermal.zones] == [
        "AO-therm", "CPU-therm", "GPU-therm", "PLL-therm", "PMIC-Die", "thermal-fan-est",
    ]  # fmt: skip
    assert thermal.zones[1] == Zone(
        name="thermal_zone1",
        kind="CPU-therm",
        temperature_c=41.5,
        trips=(Trip("passive", 97), Trip("hot", 99), Trip("critical", 102.5)),
        bindings=(Binding("cooling_device1", "passive"),),
    )
    assert thermal.zones[5].bindings == (Binding("cooling_device0", "active"),) * 2
    assert thermal.cooling[0] == CoolingDevice("cooling_device0", "pwm-fan", 2, 10)
    assert thermal.margin_c == 97 - 41.5
    assert thermal.throttling is False  # the fan is on, and that slows nothing down


def test_a_clock_that_is_lowered_for_a_passive_trip_is_throttling(tmp_path: Path) -> None:
    assert read(tmp_path, "jetson-nano-r32", **{CPU_CLOCK: "3\n"}).throttling is True


@pytest.mark.parametrize(("temperature", "throttling", "margin"), [
    ("96900", False, 0.1), ("97000", True, 0.0), ("99500", True, -2.5),
])  # fmt: skip
def test_a_zone_at_its_passive_trip_is_throttling(
    temperature: str, throttling: bool, margin: float, tmp_path: Path
) -> None:
    thermal = read(tmp_path, "jetson-nano-r32", **{CPU_TEMPERATURE: temperature})
    assert thermal.throttling is throttling
    assert thermal.margin_c == pytest.approx(margin)


def test_a_zone_without_power_has_no_temperature(tmp_path: Path) -> None:
    thermal = read(tmp_path, "orin-nano-r36")
    assert thermal.zones[2].kind == "cv0-thermal"
    assert thermal.zones[2].temperature_c is None
    assert thermal.zones[2].margin_c is None
    assert thermal.margin_c == pytest.approx(99 - 49.468)
    assert thermal.throttling is False


@pytest.mark.parametrize("temperature", ["-256000", "-274000", "2147483647"])
def test_absurd_temperatures_are_none(temperature: str, tmp_path: Path) -> None:
    thermal = read(tmp_path, "orin-nano-r36", **{f"{ZONES}/thermal_zone0/temp": temperature})
    assert thermal.zones[0].temperature_c is None


def test_a_trip_that_is_switched_off_is_no_limit(tmp_path: Path) -> None:
    off = {f"{ZONES}/thermal_zone{zone}/trip_point_0_temp": "-274000" for zone in (1, 2)}
    assert read(tmp_path, "jetson-nano-r32", **off).margin_c == 99 - 41.5


def test_a_raspberry_pi_remembers(tmp_path: Path) -> None:
    thermal = read(tmp_path, "raspberry-pi-5")
    firmware = thermal.firmware
    assert firmware is not None
    assert firmware.under_voltage_before
    assert firmware.throttled_before
    assert not (firmware.frequency_capped_before or firmware.soft_limit_before)
    assert not (firmware.under_voltage or firmware.throttled or firmware.frequency_capped or firmware.soft_limit)
    assert thermal.throttling is False
    assert thermal.margin_c is None  # its zone has neither a passive nor a hot trip


@pytest.mark.parametrize(("bits", "throttling"), [
    ("0", False), ("1", False), ("2", True), ("4", True), ("8", True), ("50005", True), ("f0000", False),
])  # fmt: skip
def test_what_a_raspberry_pis_firmware_does_now(bits: str, throttling: bool, tmp_path: Path) -> None:
    assert read(tmp_path, "raspberry-pi-5", **{THROTTLED: bits}).throttling is throttling


def test_a_machine_without_sensors_does_not_know(tmp_path: Path) -> None:
    thermal = read(tmp_path, "vm-x86-64")
    assert thermal == Thermal((), (), None)
    assert thermal.throttling is None
    assert thermal.margin_c is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("raspberry-pi-5") | {f"{ZONES}/thermal_zone0/temp": "warm", THROTTLED: "no"})
    thermal = read_thermal(tree)
    assert thermal.throttling is None
    assert set(tree.skipped) == {
        f"{ZONES}/thermal_zone0/temp: not a number: 'warm'",
        f"{THROTTLED}: not a number: 'no'",
    }


def test_this_machine() -> None:
    thermal = read_thermal(Tree())
    assert len(thermal.zones) == len(list(Path(ZONES).glob("thermal_zone*")))
