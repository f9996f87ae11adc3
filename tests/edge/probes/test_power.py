"""Power and energy: rails are told apart from their sums, and joules add up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.power import EnergyMeter, Power, Rail, read_power
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

RAPL = "/sys/class/powercap"
NANO_RAIL = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input"


def draw(root: Path, milliwatts: str) -> None:
    """Change what the sensor says, at once: a meter's thread may be reading it."""
    (root / "new").write_text(milliwatts, encoding="ascii")
    (root / "new").replace(root / NANO_RAIL)


def test_the_nanos_rails(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    power = read_power(tree)
    assert power.rails == (Rail("POM_5V_IN", 2.132), Rail("POM_5V_GPU", 0.078), Rail("POM_5V_CPU", 0.275))
    assert power.board_w == 2.132  # it feeds the others
    assert not power.counter
    assert tree.skipped == ()


def test_the_orins_rails(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36"))
    power = read_power(tree)
    assert [rail.name for rail in power.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert power.board_w == pytest.approx(5.080 * 0.936)
    assert tree.skipped == ()


def test_an_agx_orin_has_no_rail_for_all(tmp_path: Path) -> None:
    rails = (Rail("VDD_GPU_SOC", 3.0), Rail("VDD_CPU_CV", 1.0), Rail("VIN_SYS_5V0", 4.0), Rail("VDDQ_VDD2_1V8AO", 0.5))
    assert Power(rails, counter=False).board_w == 8
    assert Power(rails[:2], counter=False).board_w is None
    assert Power((Rail("VDD_IN", None),), counter=False).board_w is None


def test_channels_without_a_rail_are_left_out(tmp_path: Path) -> None:
    chip, old = "/sys/class/hwmon/hwmon3", "/sys/bus/i2c/drivers/ina3221x/1-0041/iio:device1"
    files = {f"{chip}/name": "ina3221", f"{old}/rail_name_0": "NC", f"{old}/in_power0_input": "0"}
    assert read_power(plant(tmp_path / "r32", files)).rails == ()
    files |= {f"{chip}/in{channel}_label": label for channel, label in ((1, "NC"), (2, "VIN_SYS_5V0"))}
    files |= {f"{chip}/{kind}{channel}_input": "1000" for kind in ("in", "curr") for channel in (1, 2)}
    assert read_power(plant(tmp_path / "r35", files)).rails == (Rail("VIN_SYS_5V0", 1.0),)


@pytest.mark.parametrize("board", ["raspberry-pi-5", "vm-x86-64"])
def test_boards_without_a_sensor(board: str, tmp_path: Path) -> None:
    tree = plant(tmp_path, sample(board))
    assert read_power(tree) == Power((), counter=False)
    with EnergyMeter(tree) as meter:
        assert meter.source is None
        assert meter.joules() is None
        assert "energy" not in {thread.name for thread in threading.enumerate()}
    assert tree.skipped == ()


def test_power_that_stays_the_same_is_power_times_time(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    before = time.monotonic()
    meter = EnergyMeter(tree, interval_s=0.02)
    begun = time.monotonic()
    time.sleep(0.2)
    asked = time.monotonic()
    joules = meter.joules()
    told = time.monotonic()
    meter.close()
    assert meter.source == "rails"
    assert joules is not None
    assert 2.132 * (asked - begun) * 0.99 < joules < 2.132 * (told - before) * 1.01


def test_the_thread_reads_between_two_questions(tmp_path: Path) -> None:
    """A peak of power that was over before anybody asked is in the energy."""
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    with EnergyMeter(tree, interval_s=0.01) as meter:
        start = time.monotonic()
        draw(tmp_path, "1000000")
        time.sleep(0.3)
        draw(tmp_path, "0")
        time.sleep(0.1)
        joules = meter.joules()
        seconds = time.monotonic() - start
    assert joules is not None
    assert 100 < joules < 1000 * seconds


def test_a_closed_meter_stays_where_it_was(tmp_path: Path) -> None:
    meter = EnergyMeter(plant(tmp_path, sample("jetson-nano-r32")), interval_s=0.01)
    time.sleep(0.05)
    assert "energy" in {thread.name for thread in threading.enumerate()}
    meter.close()
    assert "energy" not in {thread.name for thread in threading.enumerate()}
    meter.close()
    joules = meter.joules()
    assert joules is not None
    assert joules > 0
    time.sleep(0.05)
    assert meter.joules() == joules


def test_a_sensor_that_fails_for_a_while_is_bridged_and_named(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    before = time.monotonic()
    with EnergyMeter(tree, interval_s=0.01) as meter:
        begun = time.monotonic()
        draw(tmp_path, "?")
        time.sleep(0.1)
        draw(tmp_path, "2132")
        time.sleep(0.05)
        asked = time.monotonic()
        joules = meter.joules()
        told = time.monotonic()
    assert joules is not None
    assert 2.132 * (asked - begun) * 0.99 < joules < 2.132 * (told - before) * 1.01
    assert tree.skipped == (f"/{NANO_RAIL}: not a number: '?'",)


def rapl(zone: str, name: str, energy_uj: int, turn_uj: int = 262_143_328_850) -> dict[str, str]:
    folder = f"{RAPL}/{zone}"
    values = {"name": name, "energy_uj": str(energy_uj), "max_energy_range_uj": str(turn_uj)}
    return {f"{folder}/{file}": f"{value}\n" for file, value in values.items()}


def count(root: Path, zone: str, energy_uj: int) -> None:
    (root / RAPL[1:] / zone / "energy_uj").write_text(str(energy_uj), encoding="ascii")


def test_packages_are_counted_and_their_parts_are_not(tmp_path: Path) -> None:
    files = rapl("intel-rapl:0", "package-0", 5_000_000) | rapl("intel-rapl:1", "package-1", 7_000_000)
    files |= rapl("intel-rapl:0:0", "core", 1_000_000) | rapl("intel-rapl:2", "psys", 90_000_000)
    tree = plant(tmp_path, files)
    assert read_power(tree).counter
    with EnergyMeter(tree) as meter:
        assert meter.source == "rapl"
        assert meter.joules() == 0
        count(tmp_path, "intel-rapl:0", 8_500_000)
        count(tmp_path, "intel-rapl:1", 8_000_000)
        count(tmp_path, "intel-rapl:0:0", 9_000_000)
        count(tmp_path, "intel-rapl:2", 95_000_000)
        assert meter.joules() == pytest.approx(4.5)
        assert meter.joules() == pytest.approx(4.5)


def test_a_counter_that_begins_again_goes_on(tmp_path: Path) -> None:
    tree = plant(tmp_path, rapl("intel-rapl:0", "package-0", 999_000_000, turn_uj=1_000_000_000))
    with EnergyMeter(tree) as meter:
        count(tmp_path, "intel-rapl:0", 2_000_000)
        assert meter.joules() == pytest.approx(3)


def test_a_counter_that_only_root_may_read_is_named(tmp_path: Path) -> None:
    folder = f"{RAPL}/intel-rapl:0"
    tree = plant(tmp_path, {f"{folder}/name": "package-0", f"{folder}/energy_uj/x": ""})  # a folder: not even root may
    with EnergyMeter(tree) as meter:
        assert meter.joules() is None
    assert tree.skipped == (f"{RAPL}/intel-rapl:0/energy_uj: is a directory",)


def test_this_machine() -> None:
    tree = Tree()
    with EnergyMeter(tree) as meter:
        joules = meter.joules()
    assert (joules is None) == (meter.source is None)
