"""tegrastats, whose lines differ from release to release: what is known is read, the rest is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.resources.probes.tegrastats import CoreLoad, Rail, TegraStats, parse_tegrastats
from support.trees import RECORDED

_LINES = (RECORDED / "tegrastats.log").read_text(encoding="utf-8").splitlines()
LINES = {name.removeprefix("# "): line for name, line in zip(_LINES[::2], _LINES[1::2], strict=True)}


@pytest.mark.parametrize("name", LINES)
def test_every_release_is_understood(name: str) -> None:
    stats = parse_tegrastats(LINES[name])
    assert stats.unparsed == (("EDP", "limit", "0") if "r21" in name else ())
    assert stats.text == " ".join(LINES[name].split())
    assert stats.ram_used_mib is not None
    assert stats.ram_total_mib is not None
    assert stats.ram_used_mib < stats.ram_total_mib
    assert stats.largest_free_block_mib == (0.5 if "fragmented" in name else 4.0)
    assert len(stats.cores) >= 4
    assert stats.temperatures_c or "r21" in name
    assert all(0 < temperature <= 100 for temperature in stats.temperatures_c.values())
    assert stats.rails_mw or "r21" in name
    assert "NC" not in stats.rails_mw
    assert (stats.gpu_load_percent is None) == ("Thor" in name)


def test_a_nano() -> None:
    stats = parse_tegrastats(LINES["Jetson Nano, r32.7"])
    assert (stats.ram_used_mib, stats.ram_total_mib, stats.largest_free_blocks) == (1230, 3964, 21)
    assert (stats.swap_used_mib, stats.swap_total_mib, stats.swap_cached_mib) == (191, 1982, 6)
    assert stats.cores == (CoreLoad(18, 1479), CoreLoad(12, 1479), None, None)
    assert (stats.gpu_load_percent, stats.gpu_mhz) == (16, 76)
    assert stats.engines == {"IRAM": "0/252kB(lfb 252kB)", "EMC_FREQ": "3%@1600", "APE": "25"}
    assert stats.temperatures_c == {
        "PLL": 34, "CPU": 37, "iwlwifi": 44, "PMIC": 50, "GPU": 37, "AO": 42.5, "thermal": 37,
    }  # fmt: skip
    assert stats.rails_mw == {"POM_5V_IN": Rail(2130, 2100), "POM_5V_GPU": Rail(78, 80), "POM_5V_CPU": Rail(275, 270)}


def test_an_orin_nano() -> None:
    stats = parse_tegrastats(LINES["Jetson Orin Nano, r36"])
    assert stats.cores == (*[CoreLoad(1, 729), CoreLoad(0, 729)], *[CoreLoad(0, 1036)] * 2, None, None)
    assert (stats.gpu_load_percent, stats.gpu_mhz) == (62, 612)
    assert stats.temperatures_c["tj"] == 49.156
    assert stats.rails_mw["VDD_IN"] == Rail(4760, 4770)


def test_an_old_release_prints_one_frequency_for_all_cores() -> None:
    stats = parse_tegrastats(LINES["Jetson TX1, r21 to r24"])
    assert stats.cores == (CoreLoad(12, 1224), None, None, CoreLoad(3, 1224))
    assert stats.gpu_mhz == 76


def test_gpu_clusters_and_engines_that_are_off() -> None:
    stats = parse_tegrastats(LINES["Jetson AGX Orin, r36"])
    assert (stats.gpu_load_percent, stats.gpu_mhz) == (7, 306)
    assert stats.engines["NVDLA0"] == "off"
    assert stats.swap_used_mib == 4910


def test_without_root_there_is_no_frequency() -> None:
    stats = parse_tegrastats(LINES["Jetson Nano without root, r32"])
    assert (stats.gpu_load_percent, stats.gpu_mhz) == (0, None)


def test_sensors_without_power_are_left_out() -> None:
    assert set(parse_tegrastats(LINES["Jetson AGX Orin, r34"]).temperatures_c) == {
        "CPU", "Tboard", "SOC2", "Tdiode", "SOC0", "tj", "SOC1",
    }  # fmt: skip


def test_an_offset_may_make_power_negative() -> None:
    (name,) = (name for name in LINES if "Thor" in name)
    assert parse_tegrastats(LINES[name]).rails_mw["VDD_GPU"] == Rail(-392, -390)


def test_parts_of_a_release_to_come_are_kept() -> None:
    stats = parse_tegrastats("RAM 1/2MB (lfb 3x4MB) QPU [3%|4%] CPU [5%@6,idle] tj@45.5C FAN 30rpm")
    assert (stats.ram_total_mib, stats.temperatures_c) == (2, {"tj": 45.5})
    assert stats.unparsed == ("QPU", "[3%|4%]", "CPU", "[5%@6,idle]", "FAN", "30rpm")
    assert stats.cores == ()


def test_nothing_is_nothing() -> None:
    assert parse_tegrastats("") == TegraStats(text="")


words = st.sampled_from(sorted({word for line in LINES.values() for word in line.split()}))


@given(st.lists(words | st.text(max_size=8), max_size=40))
def test_no_word_is_lost_or_crashes(line: list[str]) -> None:
    stats = parse_tegrastats(" ".join(line))
    assert stats.text == " ".join(" ".join(line).split())
    assert set(stats.unparsed) <= set(stats.text.split())


@given(st.text(alphabet="RAMCPUGR3D_FREQ@[]()%/,.- 0123456789xkBmWVoff", max_size=200))
def test_no_line_crashes(line: str) -> None:
    parse_tegrastats(line)
