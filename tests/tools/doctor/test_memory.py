"""Memory: too little of it, what only looks like it, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.headroom import RESERVE_MIB
from fleetune.edge.resources.probes.cgroup import find_group
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup
from fleetune.edge.resources.probes.machine import probe
from fleetune.edge.resources.probes.tree import Tree
from fleetune.tools.doctor import memory
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.memory import MEMORY, MINIMUM_MIB, check_memory
from support.trees import plant, sample

NANO = "jetson-nano-r32"
SERVICE = "/sys/fs/cgroup/memory/system.slice/fleetune.service"


def check(root: Path, board: str, files: Mapping[str, str] | None = None) -> Check:
    tree = plant(root, sample(board) | dict(files or {}))
    return check_memory(probe(root), tree)


def meminfo(available_mib: int) -> dict[str, str]:
    return {"/proc/meminfo": f"MemTotal: 2031616 kB\nMemAvailable: {available_mib * 1024} kB\n"}


def test_swap_and_zram_are_counted_apart_and_are_no_budget(tmp_path: Path) -> None:
    found = check(tmp_path, NANO)
    assert (found.verdict, found.code) == ("note", 0)
    assert "4096 MiB of swap on disk and 1982 MiB of swap in zram, which no budget counts" in found.found


def test_too_little_is_a_failure_however_much_swap_there_is(tmp_path: Path) -> None:
    found = check(tmp_path / "little", NANO, meminfo(MINIMUM_MIB + int(RESERVE_MIB) - 1))
    assert (found.verdict, found.code) == ("failure", MEMORY)
    assert f"{MINIMUM_MIB - 1} MiB can be had of 1984" in found.found
    assert "stop other programs" in found.fix
    assert check(tmp_path / "enough", NANO, meminfo(MINIMUM_MIB + int(RESERVE_MIB))).verdict == "note"


@pytest.mark.parametrize(("limit", "used"), [(100, 20), (1000, 900)])
def test_a_control_groups_limit_counts_and_its_fix_is_another(limit: int, used: int, tmp_path: Path) -> None:
    sizes = {"limit_in_bytes": limit, "usage_in_bytes": used}
    files = {f"{SERVICE}/memory.{name}": str(size << 20) for name, size in sizes.items()}
    found = check(tmp_path, NANO, files | {f"{SERVICE}/memory.stat": "total_inactive_file 0\n"})
    assert (found.verdict, found.code) == ("failure", MEMORY)
    assert f"{limit} the control group's limit" in found.found
    assert "MemoryMax=" in found.fix


def test_a_kernel_that_says_nothing_is_a_failure(tmp_path: Path) -> None:
    found = check(tmp_path, NANO, {"/proc/meminfo": "MemTotal: 2031616 kB\n"})
    assert found.code == MEMORY
    assert "/proc/meminfo" in found.found


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("/proc/sys/vm/overcommit_memory", "2", "vm.overcommit_memory"),
        ("/proc/sys/vm/panic_on_oom", "1", "vm.panic_on_oom"),
        ("/proc/self/oom_score_adj", "-1000", "oom_score_adj"),
    ],
)
def test_settings_that_make_the_end_of_memory_worse_are_noted(
    path: str, value: str, words: str, tmp_path: Path
) -> None:
    assert words not in check(tmp_path / "usual", NANO, {path: "0"}).found
    found = check(tmp_path / "worse", NANO, {path: value})
    assert found.verdict == "note"
    assert words in found.found
    assert found.fix


def test_where_no_group_may_be_made_it_is_noted_that_trials_limit_themselves(tmp_path: Path) -> None:
    found = check(tmp_path, "raspberry-pi-5")
    assert found.verdict == "note"
    assert "trials run under a limit of their own" in found.found
    assert "no control group accounts for this process's memory" in found.found
    assert "Delegate=memory" in found.fix


def test_where_one_may_be_made_nothing_is_noted_and_none_stays() -> None:
    try:
        LimitedGroup(MINIMUM_MIB).close()
    except FileAccessError as error:
        pytest.skip(str(error))
    tree = Tree()
    before = groups(tree)
    assert "trials" not in check_memory(probe(), tree).found
    assert groups(tree) == before


def groups(tree: Tree) -> set[str]:
    """Groups of ours beside and below this process's."""
    place = find_group(tree)
    assert place is not None
    own = tree.path(place[2])
    return {str(path) for folder in (own, own.parent) for path in folder.glob("fleetune-*")}


def test_a_machine_with_memory_and_nothing_to_know_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_confinement", lambda _: [])  # a copy of a kernel's files makes no groups
    found = check(tmp_path, "vm-x86-64")
    assert (found.verdict, found.fix) == ("ok", "")
