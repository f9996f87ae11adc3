"""A group with limited memory: for real where this machine allows it, and in a copy of what a kernel would show."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.probes.cgroup import read_cgroup
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample

LIMIT_MIB = 48
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def may_limit() -> None:
    """Skip where this user may not make a group."""
    try:
        LimitedGroup(LIMIT_MIB).close()
    except FileAccessError as error:
        pytest.skip(str(error))


def allocate(group: LimitedGroup, mib: int) -> int:
    """Status of a process of the group that fills so much memory."""
    command = [sys.executable, "-c", f"bytearray(b'x' * ({mib} << 20))"]
    return subprocess.run(command, preexec_fn=lambda: group.add(0), timeout=60, check=False).returncode


@pytest.mark.usefixtures("may_limit")
def test_a_process_that_wants_more_is_killed_and_counted() -> None:
    with LimitedGroup(LIMIT_MIB) as group:
        assert allocate(group, 2) == 0
        assert group.oom_kills == 0
        assert allocate(group, 3 * LIMIT_MIB) == -signal.SIGKILL
        assert group.oom_kills == 1
    assert group.peak_mib == pytest.approx(LIMIT_MIB, abs=1)
    assert group.oom_kills == 1  # still known when the group is gone
    assert not Path(group.folder).exists()


@pytest.mark.usefixtures("may_limit")
def test_the_peak_is_what_was_used() -> None:
    with LimitedGroup(256) as group:
        assert allocate(group, 40) == 0
    assert group.peak_mib is not None
    assert 40 <= group.peak_mib < 120
    assert group.oom_kills == 0


@pytest.mark.usefixtures("may_limit")
def test_a_process_in_it_sees_its_limit() -> None:
    with LimitedGroup(LIMIT_MIB) as group:
        child = subprocess.Popen(SLEEP)
        group.add(child.pid)
        cgroup = read_cgroup(Tree(), child.pid)
        child.kill()
        child.wait()
    assert cgroup is not None
    assert cgroup.folder == group.folder
    assert cgroup.limit_mib == LIMIT_MIB
    assert cgroup.swap_limit_mib in (0, None)  # None where swap is not accounted for


@pytest.mark.usefixtures("may_limit")
def test_processes_that_stay_are_named_and_the_group_can_be_closed_later() -> None:
    group = LimitedGroup(LIMIT_MIB)
    child = subprocess.Popen(SLEEP)
    group.add(child.pid)
    with pytest.raises(
        FileAccessError, match=rf"cannot remove .*: device or resource busy; processes in it: {child.pid}"
    ):
        group.close()
    child.kill()
    child.wait()
    group.close()
    assert not Path(group.folder).exists()


@pytest.mark.usefixtures("may_limit")
def test_a_failure_inside_removes_it() -> None:
    with pytest.raises(ZeroDivisionError), LimitedGroup(LIMIT_MIB) as group:
        _ = 1 / 0
    assert not Path(group.folder).exists()


@pytest.mark.usefixtures("may_limit")
def test_a_process_that_is_not_there_cannot_be_added() -> None:
    with LimitedGroup(LIMIT_MIB) as group, pytest.raises(ProcessLookupError):
        group.add(1 << 22)  # above any process number


def test_a_machine_without_groups_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match=r"no control group accounts for this process's memory \(run as root"):
        LimitedGroup(64, tree=Tree(tmp_path))


# --- a kernel's folders, copied: what a group of version 2 looks like ----------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder has the files that Linux gives a group, and goes away with them."""
    real = Path.mkdir

    def mkdir(path: Path, *arguments: int, **options: bool) -> None:
        real(path, *arguments, **options)
        if not path.name.startswith("fleetune-"):
            return
        version_1 = {"limit_in_bytes": "", "swappiness": "60", "usage_in_bytes": "0", "max_usage_in_bytes": "4194304"}
        version_2 = {"max": "max", "swap.max": "max", "current": "0", "peak": "3145728", "events": "oom_kill 2\n"}
        for name, value in (version_2 if (path.parent / "cgroup.subtree_control").exists() else version_1).items():
            (path / f"memory.{name}").write_text(value, encoding="ascii")
        (path / "cgroup.procs").write_text("", encoding="ascii")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)


SLICE = "sys/fs/cgroup/system.slice"


def test_version_2_below_its_own_group(tmp_path: Path, kernel: None) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36"))
    own = tmp_path / SLICE / "fleetune.service"
    with LimitedGroup(64, tree=tree) as group:
        assert Path(group.folder).parent == Path("/", SLICE, "fleetune.service")
        path = tree.path(group.folder)
        assert (path / "memory.max").read_text(encoding="ascii") == str(64 << 20)
        assert (path / "memory.swap.max").read_text(encoding="ascii").startswith("0")
        group.add(1234)
        assert (path / "cgroup.procs").read_text(encoding="ascii") == "1234"
        assert (own / "cgroup.subtree_control").read_text(encoding="ascii") == "+memory"
        assert (group.peak_mib, group.oom_kills) == (3, 2)
    assert (own / "cgroup.subtree_control").read_text(encoding="ascii") == "+memory"  # others may rely on it by now
    assert not path.exists()


def test_version_2_beside_a_group_that_holds_processes(
    tmp_path: Path, kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses to let a group with processes hold groups: EBUSY; here, the file refuses to be written."""
    tree = plant(tmp_path, sample("orin-nano-r36"))
    own = tmp_path / SLICE / "fleetune.service"
    (own / "cgroup.subtree_control").unlink()
    with LimitedGroup(64, tree=tree) as group:
        assert Path(group.folder).parent == Path("/", SLICE)
        assert (tmp_path / SLICE / "cgroup.subtree_control").read_text(encoding="ascii") == "cpu memory pids\n"


def test_the_limit_of_its_own_group_comes_first(tmp_path: Path, kernel: None) -> None:
    tree = plant(tmp_path, sample("orin-nano-r36"))
    with LimitedGroup(8192, tree=tree) as group:
        assert (tree.path(group.folder) / "memory.max").read_text(encoding="ascii") == str(4096 << 20)


def test_a_kernel_that_does_not_account_for_swap_is_asked_not_to(tmp_path: Path, kernel: None) -> None:
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    with LimitedGroup(64, tree=tree) as group:
        path = tree.path(group.folder)
        assert (path / "memory.limit_in_bytes").read_text(encoding="ascii") == str(64 << 20)
        assert (path / "memory.swappiness").read_text(encoding="ascii").startswith("0")
        assert (group.peak_mib, group.oom_kills) == (4, None)


def test_a_group_that_lacks_the_files_is_removed_and_refused(tmp_path: Path) -> None:
    """As in a container with control groups that cannot be written to."""
    tree = plant(tmp_path, sample("jetson-nano-r32"))
    with pytest.raises(FileAccessError, match=r"cannot make a group .* in /sys/fs/cgroup/memory/.*: no such file"):
        LimitedGroup(64, tree=tree)
    assert list(tmp_path.rglob("fleetune-*")) == []
