"""The state folder's disk: read-only, full, slow, or not there yet."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.resources.probes.disk import RESERVE_MIB, Disk, read_disk
from fleetune.edge.resources.probes.tree import Tree
from fleetune.tools.doctor.disk import DISK, MINIMUM_MIB, check_disk
from fleetune.tools.doctor.host import Check

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts file systems in memory, with options such as ``size=1m``, where this user may."""
    mounted = []
    mounts, unmounts = (shutil.which(name) for name in ("mount", "umount"))
    if mounts is None or unmounts is None:
        pytest.skip("needs mount and umount")

    def make(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [mounts, "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run([unmounts, folder], check=True)


def check(folder: Path) -> Check:
    return check_disk(folder, read_disk(Tree(), folder))


def test_a_read_only_disk_is_a_failure_even_for_root(mount: Mount) -> None:
    found = check(mount("ro,size=200m"))
    assert (found.verdict, found.code) == ("failure", DISK)
    assert "cannot be written: read-only file system" in found.found
    assert "--state" in found.fix


def test_a_full_disk_is_a_failure(mount: Mount) -> None:
    folder = mount("size=1m")
    (folder / "log").write_bytes(bytes(1 << 20))
    found = check(folder)
    assert (found.verdict, found.code) == ("failure", DISK)
    assert "cannot be written: no space left on device" in found.found


def test_a_disk_with_too_little_room_is_a_failure(mount: Mount) -> None:
    found = check(mount(f"size={MINIMUM_MIB - 1}m"))
    assert (found.verdict, found.code) == ("failure", DISK)
    assert f"{MINIMUM_MIB - 1} of {MINIMUM_MIB - 1} MiB free" in found.found
    assert "make room" in found.fix


def test_without_room_for_the_prefix_cache_it_is_a_note(mount: Mount) -> None:
    found = check(mount(f"size={MINIMUM_MIB}m"))
    assert (found.verdict, found.code) == ("note", 0)
    assert "no prefix cache" in found.found


def test_a_folder_that_is_not_there_yet_is_judged_where_it_would_be(mount: Mount) -> None:
    folder = mount("ro,size=200m")
    found = check(folder / "new" / "state")
    assert found.code == DISK
    assert str(folder) in found.found
    assert "state would be made" in found.found


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.touch()
    found = check(file)
    assert found.code == DISK
    assert f"{file} is not a folder" in found.found


def test_a_disk_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    assert check_disk(tmp_path, None).code == DISK


ROOMY = Disk(folder="", total_mib=30000.0, free_mib=RESERVE_MIB + 1.0, write_mib_per_s=40.0)


def test_a_disk_with_room_is_ok_and_nothing_stays_on_it(tmp_path: Path) -> None:
    found = check_disk(tmp_path, msgspec.structs.replace(ROOMY, folder=str(tmp_path)))
    assert (found.verdict, found.fix) == ("ok", "")
    assert f"{tmp_path}: {RESERVE_MIB + 1} of 30000 MiB free, written at 40 MiB/s" in found.found
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_noted(tmp_path: Path) -> None:
    found = check_disk(tmp_path, msgspec.structs.replace(ROOMY, folder=str(tmp_path), write_mib_per_s=2.0))
    assert found.verdict == "note"
    assert "slow to write" in found.found
