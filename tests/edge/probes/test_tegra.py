"""Jetson boards: the release, the power mode and their programs, here shell scripts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.tegra import PowerMode, Tegra, read_tegra
from support.trees import RECORDED, plant, sample

LINE = (RECORDED / "tegrastats.log").read_text(encoding="utf-8").splitlines()[9]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("board", "expected"), [
    ("jetson-nano-r32", Tegra("tegra210", "32.7.1", PowerMode("5W", 1), None)),
    ("orin-nano-r36", Tegra("tegra234", "36.4.3", PowerMode("25W", 1), None)),
    ("raspberry-pi-5", None),
    ("vm-x86-64", None),
])  # fmt: skip
def test_boards(board: str, expected: Tegra | None, tmp_path: Path) -> None:
    tree = plant(tmp_path, sample(board))
    assert read_tegra(tree) == expected
    assert tree.skipped == ()


def test_their_programs_are_asked(tmp_path: Path, programs: Path) -> None:
    script(programs, "nvpmodel", '[ "$1" = -q ] && printf "NV Fan Mode:quiet\\nNV Power Mode: MAXN\\n0\\n"')
    script(programs, "tegrastats", f'while true; do echo "{LINE}"; sleep 0.1; done')
    tree = plant(tmp_path / "root", sample("jetson-nano-r32"))
    tegra = read_tegra(tree, commands=True)
    assert tegra is not None
    assert tegra.power_mode == PowerMode("MAXN", 0)
    assert tegra.stats is not None
    assert tegra.stats.rails_mw["POM_5V_IN"].now_mw == 2130
    assert tree.skipped == ()


def test_an_answer_before_a_complaint_counts_and_the_complaint_is_named(tmp_path: Path, programs: Path) -> None:
    complaint = "NVPM ERROR: Error opening /sys/kernel/nvpmodel_emc_cap/emc_iso_cap: 13"
    script(programs, "nvpmodel", f"echo 'NV Power Mode: 10W'; echo 2; echo '{complaint}' >&2; exit 1")
    tree = plant(tmp_path / "root", sample("jetson-nano-r32"))
    tegra = read_tegra(tree, commands=True)
    assert tegra is not None
    assert tegra.power_mode == PowerMode("10W", 2)
    assert tree.skipped == (f"nvpmodel: exit status 1: 'NV Power Mode: 10W\\n2\\n{complaint}'",)


def test_a_mode_without_its_number(tmp_path: Path, programs: Path) -> None:
    script(programs, "nvpmodel", "echo 'NV Power Mode: MODE_30W_ALL'")
    tegra = read_tegra(plant(tmp_path / "root", sample("jetson-nano-r32")), commands=True)
    assert tegra is not None
    assert tegra.power_mode == PowerMode("MODE_30W_ALL", None)


def test_programs_that_want_root_or_hang_are_named_and_what_is_written_down_counts(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(programs, "nvpmodel", "echo must be run as root; exit 1")
    script(programs, "tegrastats", "echo Run tegrastats with sudo; exit 1")
    tree = plant(tmp_path / "root", sample("jetson-nano-r32"))
    tegra = read_tegra(tree, commands=True)
    assert tegra is not None
    assert tegra.power_mode == PowerMode("5W", 1)
    assert tegra.stats is None
    assert [note.partition(":")[0] for note in tree.skipped] == ["nvpmodel", "nvpmodel", "tegrastats"]
    assert "must be run as root" in tree.skipped[0]
    assert "Run tegrastats with sudo" in tree.skipped[2]


def test_a_board_whose_programs_hang_answers_in_time(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(programs, "tegrastats", "sleep 60")
    monkeypatch.setattr("fleetune.edge.resources.probes.tegrastats.TIMEOUT_S", 0.3)
    tree = plant(tmp_path / "root", sample("jetson-nano-r32"))
    start = time.monotonic()
    tegra = read_tegra(tree, commands=True)
    assert time.monotonic() - start < 10
    assert tegra is not None
    assert tegra.stats is None
    assert tree.skipped == ("tegrastats: did not end in time",)


@pytest.mark.parametrize(("path", "text"), [
    ("/etc/nv_tegra_release", "# a release"), ("/var/lib/nvpmodel/status", "mode: fast"),
])  # fmt: skip
def test_what_is_not_understood_is_named(path: str, text: str, tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32") | {path: text})
    tegra = read_tegra(tree)
    assert tegra is not None
    assert None in (tegra.l4t, tegra.power_mode)
    assert tree.skipped == (f"{path}: not understood: {text!r}",)


def test_a_container_on_a_jetson_may_see_the_device_tree_alone(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/device-tree/compatible": "nvidia,jetson-nano\0nvidia,tegra210\0"})
    assert read_tegra(tree) == Tegra("tegra210", None, None, None)
