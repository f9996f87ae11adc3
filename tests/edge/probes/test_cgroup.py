"""The group that accounts for a process's memory: both versions, on a host and in a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleetune.edge.resources.probes.cgroup import Cgroup, Events, read_cgroup
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

MIB = 1 << 20
UNLIMITED = "9223372036854771712"
V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"
V1_MOUNT = "35 29 0:31 {root} /sys/fs/cgroup/memory rw shared:15 - cgroup cgroup rw,memory\n"
V2_MOUNT = "31 23 0:27 {root} /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_the_nano_counts_in_version_1(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    assert read_cgroup(tree) == Cgroup(
        version=1,
        folder=f"{V1}/system.slice/fleetune.service",
        limit_mib=1024,
        high_mib=None,
        swap_limit_mib=None,  # this kernel does not account for swap
        usage_mib=384,
        peak_mib=512,
        events=Events(oom=None, oom_kill=None, high=None, max=3),  # nor does it count what it kills
    )
    assert tree.skipped == ()


def test_the_orin_counts_in_version_2(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36"))
    assert read_cgroup(tree) == Cgroup(
        version=2,
        folder=f"{V2}/system.slice/fleetune.service",
        limit_mib=4096,  # of the slice above it
        high_mib=3072,
        swap_limit_mib=0,
        usage_mib=700,
        peak_mib=None,  # Linux 5.19 is the first with memory.peak
        events=Events(oom=1, oom_kill=1, high=17, max=4),
    )
    assert tree.skipped == ()


def test_a_raspberry_pi_does_not_account_for_memory(tmp_path: Path) -> None:
    tree = plant(tmp_path, sample("raspberry-pi-5"))
    assert read_cgroup(tree) is None
    assert tree.skipped == ()


def test_version_2_beside_version_1_has_no_memory_controller(tmp_path: Path) -> None:
    cgroup = read_cgroup(plant(tmp_path, sample("vm-x86-64")))
    assert cgroup is not None
    assert (cgroup.version, cgroup.folder, cgroup.limit_mib) == (1, f"{V1}/agent", None)
    assert cgroup.events.oom_kill == 0


def version_1(root: str, group: str) -> dict[str, str]:
    return {"/proc/self/mountinfo": V1_MOUNT.format(root=root), "/proc/self/cgroup": f"4:memory:{group}\n"}


def version_2(root: str, group: str) -> dict[str, str]:
    return {
        "/proc/self/mountinfo": V2_MOUNT.format(root=root),
        "/proc/self/cgroup": f"0::{group}\n",
        f"{V2}/cgroup.controllers": "cpu memory\n",
    }


@pytest.mark.parametrize("limits", [(300, 200, 100), (100, 300, 200), (200, 100, 300), (None, 100, None)])
@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_above_counts(version: int, limits: tuple[int | None, ...], tmp_path: Path) -> None:
    files, top = (version_1("/", "/a/b"), V1) if version == 1 else (version_2("/", "/a/b"), V2)
    name, unlimited = ("memory.limit_in_bytes", UNLIMITED) if version == 1 else ("memory.max", "max")
    for folder, limit in zip((top, f"{top}/a", f"{top}/a/b"), limits, strict=True):
        files[f"{folder}/{name}"] = unlimited if limit is None else str(limit * MIB)
        files[f"{folder}/memory.current"] = "0"
    cgroup = read_cgroup(plant(tmp_path, files))
    assert cgroup is not None
    assert cgroup.limit_mib == 100


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("root", "group", "inner"), [
    ("/", "/", ""),  # a container with a namespace of its own
    ("/docker/1a", "/docker/1a", ""),  # one without
    ("/docker/1a", "/docker/1a/inner", "/inner"),
    ("/", "/docker/1a", ""),  # the host's path, which is not visible here
    ("/docker/1a", "/system.slice", ""),
    ("/", "/../../other", ""),  # outside of the namespace
    ("/..", "/inner", "/inner"),
])  # fmt: skip
def test_containers(root: str, group: str, inner: str, version: int, tmp_path: Path) -> None:
    files, top = (version_1(root, group), V1) if version == 1 else (version_2(root, group), V2)
    usage = "memory.usage_in_bytes" if version == 1 else "memory.current"
    tree = plant(tmp_path, files | {f"{top}/{usage}": "1048576", f"{top}/inner/{usage}": "1048576"})
    cgroup = read_cgroup(tree)
    assert cgroup is not None
    assert (cgroup.version, cgroup.folder, cgroup.usage_mib) == (version, f"{top}{inner}", 1)
    assert tree.skipped == ()


def test_a_container_of_version_1_knows_limits_that_it_does_not_see(tmp_path: Path) -> None:
    files = version_1("/docker/1a", "/docker/1a") | {
        f"{V1}/memory.limit_in_bytes": UNLIMITED,
        f"{V1}/memory.memsw.limit_in_bytes": UNLIMITED,
        f"{V1}/memory.stat": f"hierarchical_memory_limit {256 * MIB}\nhierarchical_memsw_limit {300 * MIB}\n",
    }
    cgroup = read_cgroup(plant(tmp_path, files))
    assert cgroup is not None
    assert (cgroup.limit_mib, cgroup.swap_limit_mib) == (256, 44)


def test_a_group_without_the_controller_is_accounted_for_above_it(tmp_path: Path) -> None:
    files = version_2("/", "/user/app") | {f"{V2}/user/memory.current": "0", f"{V2}/user/app/cgroup.procs": "1"}
    cgroup = read_cgroup(plant(tmp_path, files))
    assert cgroup is not None
    assert cgroup.folder == f"{V2}/user"


def test_unlimited_depends_on_the_page_size(tmp_path: Path) -> None:
    """64 KiB pages: LONG_MAX rounded down to another number."""
    files = version_1("/", "/a") | {f"{V1}/a/memory.limit_in_bytes": "9223372036854710272"}
    cgroup = read_cgroup(plant(tmp_path, files))
    assert cgroup is not None
    assert cgroup.limit_mib is None


def test_mount_points_may_hold_spaces(tmp_path: Path) -> None:
    files = version_2("/", "/a") | {
        "/proc/self/mountinfo": "31 23 0:27 / /my\\040groups rw - cgroup2 cgroup2 rw\n",
        "/my groups/cgroup.controllers": "memory",
        "/my groups/a/memory.current": "0",
    }
    cgroup = read_cgroup(plant(tmp_path, files))
    assert cgroup is not None
    assert cgroup.folder == "/my groups/a"


def test_a_damaged_limit_is_named(tmp_path: Path) -> None:
    files = version_2("/", "/a") | {f"{V2}/a/memory.current": "0", f"{V2}/a/memory.max": "lots"}
    tree = plant(tmp_path, files)
    cgroup = read_cgroup(tree)
    assert cgroup is not None
    assert cgroup.limit_mib is None
    assert tree.skipped == (f"{V2}/a/memory.max: not a number: 'lots'",)


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    assert read_cgroup(tree) is None
    assert tree.skipped == ()


def test_this_process_by_its_number() -> None:
    tree = Tree()
    own, numbered = read_cgroup(tree), read_cgroup(tree, os.getpid())
    assert (own is None) == (numbered is None)
    if own is not None and numbered is not None:
        assert own.folder == numbered.folder
        assert Path(own.folder).is_dir()
        assert str(os.getpid()) in (Path(own.folder) / "cgroup.procs").read_text(encoding="ascii").split()
