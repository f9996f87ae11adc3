"""Waiting for memory: measured by the kernel, or a stand-in that says that it is one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.pressure import (
    WAITS_PER_S,
    Paging,
    PressureGauge,
    Pressures,
    Stalled,
    Stalls,
    read_pressures,
)
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

GROUP = "/sys/fs/cgroup/system.slice/fleetune.service"
MEMORY = "/proc/pressure/memory"


def psi(some_us: int, full_us: int | None = 0) -> str:
    text = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={some_us}\n"
    return text if full_us is None else text + f"full avg10=0.00 avg60=0.00 avg300=0.00 total={full_us}\n"


def vmstat(**counters: int) -> str:
    return "nr_free_pages 1\n" + "".join(f"{name} {value}\n" for name, value in counters.items())


def test_the_orin_measures_waiting(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36"))
    pressures = read_pressures(tree, GROUP)
    assert pressures.memory == Stalled(Stalls(1.53, 0.87, 0.21, 1.843245), Stalls(0.97, 0.44, 0.10, 1.102332))
    assert pressures.cpu is not None
    assert pressures.cpu.some is not None
    assert pressures.cpu.some.avg10_percent == 12.04
    assert pressures.io is not None
    assert pressures.cgroup_memory == Stalled(Stalls(2.5, 1.25, 0.5, 2.5), Stalls(1.5, 0.75, 0.25, 1.5))
    assert tree.skipped == ()


@pytest.mark.parametrize("board", ["jetson-nano-r32", "raspberry-pi-5"])
def test_kernels_that_do_not(board: str, tmp_path: Path) -> None:
    tree = plant(tmp_path, sample(board))
    assert read_pressures(tree) == Pressures(None, None, None, None)
    assert tree.skipped == ()
    with PressureGauge(tree) as gauge:
        assert gauge.source == "/proc/vmstat"
        reading = gauge.read()
    assert reading is not None
    assert reading.stand_in
    assert reading.full_share is reading.stalled is None


def test_full_may_be_missing(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/pressure/cpu": psi(5, None)})
    assert read_pressures(tree).cpu == Stalled(Stalls(0, 0, 0, 5e-6), None)


def test_the_share_is_of_the_time_since_the_reading_before(tmp_path: Path) -> None:
    tree = plant(tmp_path, {MEMORY: psi(1_000_000, 500_000)})
    with PressureGauge(tree) as gauge:
        assert gauge.source == MEMORY
        time.sleep(0.1)
        (tmp_path / MEMORY[1:]).write_text(psi(1_050_000, 510_000), encoding="ascii")
        first = gauge.read()
        second = gauge.read()
    assert first is not None
    assert not first.stand_in
    assert first.paging is None
    assert 0.1 <= first.interval_s < 1
    assert first.some_share == pytest.approx(0.05 / first.interval_s)
    assert first.full_share == pytest.approx(0.01 / first.interval_s)
    assert second is not None
    assert second.some_share == 0


def test_the_share_is_at_most_one(tmp_path: Path) -> None:
    tree = plant(tmp_path, {MEMORY: psi(0)})
    with PressureGauge(tree) as gauge:
        (tmp_path / MEMORY[1:]).write_text(psi(10**9), encoding="ascii")
        reading = gauge.read()
    assert reading is not None
    assert reading.some_share == 1


def test_a_groups_pressure_comes_first(tmp_path: Path) -> None:
    with PressureGauge(plant(tmp_path, sample("orin-nano-r36")), GROUP) as gauge:
        assert gauge.source == f"{GROUP}/memory.pressure"


@pytest.mark.parametrize("stalls", ["allocstall", "allocstall_normal"])  # before Linux 4.8, and since
def test_the_stand_in_counts_what_tasks_wait_for(stalls: str, tmp_path: Path) -> None:
    before = {"pgmajfault": 100, "pswpin": 5, "pswpout": 7, stalls: 50, "pgscan_direct": 10}
    after = {"pgmajfault": 160, "pswpin": 25, "pswpout": 37, stalls: 90, "pgscan_direct": 20}
    after |= {"allocstall_movable": 0, "pgscan_direct_throttle": 1000}
    tree = plant(tmp_path, {"/proc/vmstat": vmstat(**before)})
    with PressureGauge(tree) as gauge:
        time.sleep(0.1)
        (tmp_path / "proc/vmstat").write_text(vmstat(**after), encoding="ascii")
        reading = gauge.read()
    assert reading is not None
    seconds = reading.interval_s
    assert reading.stand_in
    assert reading.some_share == pytest.approx(100 / seconds / WAITS_PER_S)
    assert reading.paging is not None
    rates = Paging(60 / seconds, 20 / seconds, 30 / seconds, 40 / seconds, 10 / seconds)
    for field in Paging.__struct_fields__:
        assert getattr(reading.paging, field) == pytest.approx(getattr(rates, field)), field


def test_counters_by_zone_are_added(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/vmstat": vmstat(allocstall_normal=1, allocstall_movable=2, pgscan_direct_dma=3)})
    with PressureGauge(tree) as gauge:
        later = vmstat(allocstall_normal=11, allocstall_movable=22, pgscan_direct_dma=33)
        (tmp_path / "proc/vmstat").write_text(later, encoding="ascii")
        reading = gauge.read()
    assert reading is not None
    assert reading.paging is not None
    assert reading.paging.reclaims_per_s * reading.interval_s == pytest.approx(30)
    assert reading.paging.scanned_per_s * reading.interval_s == pytest.approx(30)


def test_pressure_that_cannot_be_read_is_named_and_the_stand_in_taken(tmp_path: Path) -> None:
    """A kernel with psi=0 has the files, and fails when they are read; so does a folder."""
    tree = plant(tmp_path, {f"{MEMORY}/x": "", "/proc/vmstat": vmstat(pgmajfault=1)})
    with PressureGauge(tree) as gauge:
        assert gauge.source == "/proc/vmstat"
    assert tree.skipped == (f"{MEMORY}: is a directory",)


def test_a_file_in_another_form_is_named(tmp_path: Path) -> None:
    tree = plant(tmp_path, {MEMORY: "quite some", "/proc/vmstat": "nothing 1"})
    assert read_pressures(tree).memory is None
    with PressureGauge(tree) as gauge:
        assert gauge.source is None
        assert gauge.read() is None
    assert [note.partition(":")[0] for note in tree.skipped] == [MEMORY, MEMORY, "/proc/vmstat"]


def test_a_closed_gauge_reads_nothing(tmp_path: Path) -> None:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    gauge = PressureGauge(plant(tmp_path, {MEMORY: psi(0)}))
    gauge.close()
    gauge.close()
    assert gauge.read() is None
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_this_machine() -> None:
    tree = Tree()
    with PressureGauge(tree) as gauge:
        assert gauge.source is not None
        start = time.perf_counter()
        readings = [gauge.read() for _ in range(200)]
        seconds = (time.perf_counter() - start) / len(readings)
    assert all(reading is not None and 0 <= reading.some_share <= 1 for reading in readings)
    assert seconds < 1e-3  # 10 µs by itself; this bound is for a busy machine
