"""A control group of our own, in which processes get so much memory and no more; who wants more is killed."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from types import TracebackType

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.probes.cgroup import Cgroup, find_group, read_group
from fleetune.edge.resources.probes.tree import Tree, reason

_REMEDY = (
    "run as root, or in a systemd unit with Delegate=memory; where the kernel's command line has "
    "cgroup_disable=memory, or a container's control groups are read-only, there is no limit to be had"
)
_WAIT_S = 2.0


class LimitedGroup:
    """A group below this process's own, with a limit of memory and without swap, that is removed at the end::

        with LimitedGroup(256) as group:
            process = subprocess.Popen(command, preexec_fn=lambda: group.add(0))
            process.wait()
        group.peak_mib, group.oom_kills

    Add a process before it allocates: what it has by then stays with the group that it comes from. In version 2 a
    group that holds processes cannot hold groups, so that ours is made beside this process's own if it cannot be made
    below it. Where version 1 does not account for swap, the kernel is asked to keep the group's memory out of it
    (``memory.swappiness`` 0).

    Args:
        limit_mib: The limit in MiB, page cache included; a smaller limit of this process's own group comes first.
        tree: Where control groups are.

    Attributes:
        folder: The group's folder.

    Raises:
        FileAccessError: This process may not make such a group, or its kernel cannot; also if processes are still in
            the group at the end.
    """

    def __init__(self, limit_mib: float, *, tree: Tree | None = None) -> None:
        self._tree = tree or Tree()
        place = find_group(self._tree)
        if place is None:
            raise FileAccessError("no control group accounts for this process's memory", _REMEDY)
        self._version, self._mount, folder = place
        own = read_group(self._tree, *place)
        self._last: Cgroup | None = None
        limit = int(min(limit_mib, own.limit_mib or limit_mib) * (1 << 20))
        parents = [folder]
        if self._version == 2 and folder != self._mount:
            parents.append(folder.rpartition("/")[0])
        failures = []
        for parent in parents:
            self.folder = f"{parent}/fleetune-{secrets.token_hex(4)}"
            self._path = self._tree.path(self.folder)
            try:
                self._make(self._tree.path(parent), limit)
            except OSError as error:
                self._remove()
                failures.append(f"{parent}: {reason(error)}")
            else:
                return
        raise FileAccessError(f"cannot make a group with limited memory in {'; '.join(failures)}", _REMEDY)

    def _make(self, parent: Path, limit: int) -> None:
        if self._version == 2:
            control = parent / "cgroup.subtree_control"
            if "memory" not in control.read_text(encoding="ascii").split():
                _write(control, "+memory")  # and left so: to take it back would free other groups from their limits
            self._path.mkdir()
            _write(self._path / "memory.max", str(limit))
            _write(self._path / "memory.swap.max", "0", missing_ok=True)  # a kernel without swap
            return
        self._path.mkdir()
        _write(self._path / "memory.limit_in_bytes", str(limit))
        if not _write(self._path / "memory.memsw.limit_in_bytes", str(limit), missing_ok=True):
            _write(self._path / "memory.swappiness", "0")

    def add(self, process: int) -> None:
        """Move a process into the group, with what it allocates from now on.

        Args:
            process: Its number; 0 for the process that calls, such as a child between fork and exec.

        Raises:
            OSError: There is no such process, or it may not be moved.
        """
        _write(self._path / "cgroup.procs", str(process))

    @property
    def peak_mib(self) -> float | None:
        """The most memory that the group has used, in MiB; None where the kernel does not say (before Linux 5.19)."""
        return self._now().peak_mib

    @property
    def oom_kills(self) -> int | None:
        """Processes that the kernel killed for memory; None where it does not say (version 1 before Linux 4.17)."""
        return self._now().events.oom_kill

    def _now(self) -> Cgroup:
        if self._last is None:
            return read_group(self._tree, self._version, self._mount, self.folder)
        return self._last

    def close(self) -> None:
        """Remove the group; its peak and kills can still be asked for."""
        if self._last is not None:
            return
        last = self._now()
        self._remove()
        self._last = last

    def _remove(self) -> None:
        end = time.monotonic() + _WAIT_S
        while self._path.is_dir():
            try:
                self._path.rmdir()
            except OSError as error:  # a process that was killed leaves its group a little later
                if time.monotonic() > end:
                    left = " ".join((self._path / "cgroup.procs").read_text(encoding="ascii").split())
                    raise FileAccessError(
                        f"cannot remove {self.folder}: {reason(error)}; processes in it: {left or 'none'}",
                        "end these processes, then remove the folder with rmdir",
                    ) from error
                time.sleep(0.01)

    def __enter__(self) -> LimitedGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(path: Path, value: str, *, missing_ok: bool = False) -> bool:
    """Set a value; whether there is such a file. Never makes one, so that a kernel without it is noticed."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if missing_ok:
            return False
        raise
    try:
        os.write(descriptor, value.encode("ascii"))
    finally:
        os.close(descriptor)
    return True
