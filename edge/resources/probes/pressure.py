"""How long tasks wait for memory, processor and disk: pressure stall information, or a stand-in where it is missing."""

from __future__ import annotations

import os
import re
import time
from types import TracebackType

import msgspec

from fleetune.edge.resources.probes.tree import Tree, reason

PSI_FOLDER = "/proc/pressure"

WAITS_PER_S = 1500
"""Waits a second that the stand-in takes for a whole second of waiting: the random reads of an SD card of class A1.

SD Association, Physical Layer Specification 5.1: an A1 card reads at least 1500 blocks of 4 KiB a second.
"""

_VMSTAT = "/proc/vmstat"
_LIMIT = 32 << 10
_SHARE = rb"([0-9]{1,4}\.[0-9]{2})"
_PSI = re.compile(
    rb"^(some|full) avg10=%b avg60=%b avg300=%b total=([0-9]{1,19})$" % (_SHARE, _SHARE, _SHARE), re.MULTILINE
)
_COUNTERS = re.compile(rb"^(pgmajfault|pswpin|pswpout|allocstall\w*|pgscan_direct\w*) ([0-9]{1,19})$", re.MULTILINE)


class Stalls(msgspec.Struct, frozen=True):
    """Time in which tasks waited, as the kernel's `Documentation/accounting/psi.rst` defines it.

    Attributes:
        avg10_percent: Share of the time, mean over the last 10 s.
        avg60_percent: The same over 60 s.
        avg300_percent: The same over 300 s.
        total_s: Seconds since the machine, or the group, started.
    """

    avg10_percent: float
    avg60_percent: float
    avg300_percent: float
    total_s: float


class Stalled(msgspec.Struct, frozen=True):
    """Waiting for one resource.

    Attributes:
        some: Time in which at least one task waited.
        full: Time in which all tasks that wanted to run waited; None for the processor before Linux 5.13.
    """

    some: Stalls | None
    full: Stalls | None


class Pressures(msgspec.Struct, frozen=True):
    """Waiting on the whole machine, and of one control group; None where the kernel does not say.

    Attributes:
        memory: Waiting for memory.
        cpu: Waiting for the processor.
        io: Waiting for disks.
        cgroup_memory: Waiting for memory in the group.
    """

    memory: Stalled | None
    cpu: Stalled | None
    io: Stalled | None
    cgroup_memory: Stalled | None


class Paging(msgspec.Struct, frozen=True):
    """What the kernel did for want of memory, between two readings.

    Attributes:
        major_faults_per_s: Pages that a task had to wait for because they were on disk or in swap.
        swapped_in_per_s: Pages that came from swap.
        swapped_out_per_s: Pages that went to swap.
        reclaims_per_s: Times that a task had to free memory itself before it got some.
        scanned_per_s: Pages that tasks looked at for that.
    """

    major_faults_per_s: float
    swapped_in_per_s: float
    swapped_out_per_s: float
    reclaims_per_s: float
    scanned_per_s: float


class Pressure(msgspec.Struct, frozen=True):
    """Waiting for memory, between two readings of a :class:`PressureGauge`.

    Attributes:
        interval_s: Seconds since the reading before.
        some_share: Share of them in which at least one task waited. Of the stand-in, an estimate between 0 and 1: major
            faults and reclaims a second by :data:`WAITS_PER_S`.
        stand_in: Whether this was computed from paging, because the kernel does not measure waiting.
        full_share: Share in which all tasks waited; None from the stand-in.
        stalled: The kernel's own means; None from the stand-in.
        paging: What the stand-in is computed from; None where waiting is measured.
    """

    interval_s: float
    some_share: float
    stand_in: bool
    full_share: float | None = None
    stalled: Stalled | None = None
    paging: Paging | None = None


def read_pressures(tree: Tree, cgroup: str | None = None) -> Pressures:
    """What the kernel says about waiting.

    Args:
        tree: Where to read.
        cgroup: Folder of a control group of version 2.
    """
    return Pressures(
        memory=_read(tree, f"{PSI_FOLDER}/memory"),
        cpu=_read(tree, f"{PSI_FOLDER}/cpu"),
        io=_read(tree, f"{PSI_FOLDER}/io"),
        cgroup_memory=_read(tree, f"{cgroup}/memory.pressure") if cgroup else None,
    )


def _read(tree: Tree, path: str) -> Stalled | None:
    text = tree.text(path)
    if text is None:
        return None
    stalled = _parse(text.encode())
    if stalled.some is None:
        tree.skip(path, f"not understood: {text!r}")
        return None
    return stalled


def _parse(data: bytes) -> Stalled:
    found = {
        kind: Stalls(float(avg10), float(avg60), float(avg300), int(total) / 1e6)
        for kind, avg10, avg60, avg300, total in _PSI.findall(data)
    }
    return Stalled(some=found.get(b"some"), full=found.get(b"full"))


class PressureGauge:
    """Reads the pressure of memory again and again, from a file that stays open.

    The machine's, because what runs beside us counts as well; or that of a control group of version 2, in which the
    kernel measures waiting for the group's own limit. Each reading tells of the time since the one before, the first
    of the time since the gauge was made.

    Args:
        tree: Where to read. What cannot be read is named there, and the next best source is taken.
        cgroup: Folder of a control group of version 2.

    Attributes:
        source: The file that is read; None if there is none, and then so is every reading.
    """

    def __init__(self, tree: Tree, cgroup: str | None = None) -> None:
        self._tree = tree
        self._descriptor = -1
        self._time = 0.0
        self._before: dict[str, float] = {}
        self.source: str | None = None
        group = [f"{cgroup}/memory.pressure"] if cgroup else []
        for path in [*group, f"{PSI_FOLDER}/memory", _VMSTAT]:
            if self._open(path):
                break

    def _open(self, path: str) -> bool:
        try:
            self._descriptor = os.open(self._tree.path(path), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._tree.skip(path, reason(error))
            return False
        self.source = path
        self._before = {}
        if self.read() is None:  # such as a kernel with psi=0: the file is there, but reading it fails
            self.close()
            return False
        return True

    def read(self) -> Pressure | None:
        """Waiting since the reading before; None if it cannot be read any more, which the tree then names."""
        if self.source is None:
            return None
        now = time.monotonic()
        try:
            data = os.pread(self._descriptor, _LIMIT, 0)
        except OSError as error:
            self._tree.skip(self.source, reason(error))
            return None
        interval, self._time = max(now - self._time, 1e-9), now
        return self._paging(data, interval) if self.source == _VMSTAT else self._stalled(data, interval)

    def _stalled(self, data: bytes, interval: float) -> Pressure | None:
        stalled = _parse(data)
        if stalled.some is None:
            self._tree.skip(str(self.source), f"not understood: {data[:80]!r}")
            return None
        totals = {"some": stalled.some.total_s}
        if stalled.full is not None:
            totals["full"] = stalled.full.total_s
        shares = {name: min(1.0, seconds / interval) for name, seconds in self._since(totals).items()}
        return Pressure(interval, shares["some"], stand_in=False, full_share=shares.get("full"), stalled=stalled)

    def _paging(self, data: bytes, interval: float) -> Pressure | None:
        counters = dict.fromkeys(("pgmajfault", "pswpin", "pswpout", "allocstall", "pgscan_direct"), 0.0)
        found = _COUNTERS.findall(data)
        if not found:
            self._tree.skip(_VMSTAT, "no counter of paging")
            return None
        for name, value in found:  # newer kernels count reclaims by zone: allocstall_normal, allocstall_movable
            if name != b"pgscan_direct_throttle":
                kind = b"allocstall" if name.startswith(b"allocstall") else name
                kind = b"pgscan_direct" if kind.startswith(b"pgscan_direct") else kind
                counters[kind.decode()] += int(value)
        rates = {name: count / interval for name, count in self._since(counters).items()}
        share = min(1.0, (rates["pgmajfault"] + rates["allocstall"]) / WAITS_PER_S)
        return Pressure(interval, share, stand_in=True, paging=Paging(*rates.values()))

    def _since(self, totals: dict[str, float]) -> dict[str, float]:
        before, self._before = self._before, totals
        return {name: max(0.0, total - before.get(name, total)) for name, total in totals.items()}

    def close(self) -> None:
        """Let the file go."""
        if self.source is not None:
            os.close(self._descriptor)
            self.source = None

    def __enter__(self) -> PressureGauge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
