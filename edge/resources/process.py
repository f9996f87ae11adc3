"""What this process has used, as the kernel counts it, and what the machine has."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path

import psutil

_PAGE = resource.getpagesize()


def peak_mib() -> float:
    """Largest resident set of this process so far, in MiB (``VmHWM``: mapped files are included)."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise RuntimeError("this kernel does not report VmHWM in /proc/self/status")
    return int(match[1]) / 1024


def resident_mib() -> float:
    """Resident set of this process now, in MiB; mapped files are included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * _PAGE / (1 << 20)


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads, user and system, in seconds."""
    return time.process_time()


class Stopwatch:
    """Seconds, and CPU seconds of this process, from now on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), cpu_seconds()

    def read(self) -> tuple[float, float]:
        """Both."""
        return time.perf_counter() - self._start[0], cpu_seconds() - self._start[1]


def machine_memory_mib() -> float:
    """Physical memory of this machine in MiB."""
    return psutil.virtual_memory().total / (1 << 20)
