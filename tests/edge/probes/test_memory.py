"""Memory: swap on disk and compressed swap are told apart, and neither is taken for memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fleetune.edge.resources.probes.memory import Memory, read_memory
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

ZRAM = "      10485760  2097152  3145728        0  3145728        0        0"


def test_the_nanos_swap_on_disk_and_in_zram_are_apart(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    memory = read_memory(tree)
    assert memory.total_mib == pytest.approx(3964.2, abs=0.1)
    assert memory.available_mib == pytest.approx(1452)
    assert memory.swap_total_mib == pytest.approx(4096, abs=0.1)
    assert memory.swap_used_mib == 4
    assert memory.zram_total_mib == pytest.approx(1982.1, abs=0.1)
    assert memory.zram_used_mib == pytest.approx(144, abs=0.1)
    assert memory.zram_resident_mib == 48
    assert tree.skipped == ()


def test_a_kernel_without_swap_does_not_report_zero(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/meminfo": "MemTotal: 2048 kB\n"})
    assert read_memory(tree) == Memory(2.0, None, None, None, None, None, None)
    assert tree.skipped == ()


def test_swap_that_is_off_is_zero(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n"})
    memory = read_memory(tree)
    assert (memory.swap_total_mib, memory.swap_used_mib, memory.zram_total_mib) == (0, 0, 0)
    assert memory.zram_resident_mib is None


def test_a_swap_files_name_may_hold_spaces(tmp_path: Path) -> None:
    swaps = "Filename Type Size Used Priority\n/my swap\\040(deleted) file 2048 1024 -2\n"
    memory = read_memory(plant(tmp_path, {"/proc/swaps": swaps}))
    assert (memory.swap_total_mib, memory.swap_used_mib) == (2, 1)


def test_damaged_lines_are_named_and_the_others_count(tmp_path: Path) -> None:
    files = {
        "/proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 1024 x 5\n/swap file 2048 0 -2\n",
        "/sys/block/zram0/mm_stat": ZRAM,
        "/sys/block/zram1/mm_stat": "1 2",
        "/sys/block/sda/mm_stat": ZRAM,
    }
    tree = plant(tmp_path, files)
    memory = read_memory(tree)
    assert (memory.swap_total_mib, memory.zram_total_mib, memory.zram_resident_mib) == (2, 0, 3)
    assert len(tree.skipped) == 2
    assert tree.skipped[0].startswith("/proc/swaps: not understood: '/dev/zram0")
    assert tree.skipped[1] == "/sys/block/zram1/mm_stat: not understood: '1 2'"


def test_this_machine() -> None:
    memory = read_memory(Tree())
    assert memory.total_mib == pytest.approx(psutil.virtual_memory().total / (1 << 20))
    assert memory.available_mib == pytest.approx(psutil.virtual_memory().available / (1 << 20), rel=0.2)
    swap = (memory.swap_total_mib or 0) + (memory.zram_total_mib or 0)
    assert swap == pytest.approx(psutil.swap_memory().total / (1 << 20), abs=0.1)
