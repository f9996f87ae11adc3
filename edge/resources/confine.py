"""Runs a measurement where it cannot take the machine down with it."""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import FileAccessError
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup

_SLACK_MIB = 96
"""Address space for data that a process asks for and does not use: thread stacks, reserves of allocators."""

_LEAST_MIB = 1.0

_OUT_OF_MEMORY = (b"MemoryError", b"bad_alloc", b"Failed to allocate memory")
"""What NumPy, the C++ library and ONNX Runtime say."""


class Killed(msgspec.Struct, frozen=True):
    """A process that wanted more memory than it was given.

    Attributes:
        limit_mib: What it was given.
    """

    limit_mib: float


def run_confined(
    module: str, request: bytes, *, limit_mib: float | None, timeout: float
) -> subprocess.CompletedProcess[bytes] | Killed:
    """Run ``python -m module`` with a request on its standard input.

    The limit is a control group's where this process may make one, and else the process's own of its data segment.
    In either case the kernel is told to kill this process first if the machine runs out of memory.

    Args:
        module: Name of the module; it must call :func:`enter` before it takes memory.
        request: Its standard input.
        limit_mib: MiB that it may take; None for what there is.
        timeout: Seconds.

    Raises:
        subprocess.TimeoutExpired: It took too long, and was killed.
    """
    if limit_mib is not None:
        limit_mib = max(limit_mib, _LEAST_MIB)  # a control group takes a limit below zero for none
    group = limited_group(limit_mib)
    command = [sys.executable, "-m", module]
    if limit_mib is not None and group is None:
        command.append(f"{limit_mib:.0f}")
    pipe = subprocess.PIPE
    with group or nullcontext(), subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        try:
            if group is not None:
                group.add(child.pid)  # it waits for its request, and has taken next to nothing yet
            out, errors = child.communicate(request, timeout)
        except BaseException:
            child.kill()
            raise
    done = subprocess.CompletedProcess(command, child.returncode, out, errors)
    wanted = group is not None and bool(group.oom_kills)
    if limit_mib is not None and done.returncode and (wanted or _is_out_of_memory(done)):
        return Killed(limit_mib)
    return done


def limited_group(limit_mib: float | None) -> LimitedGroup | None:
    """A control group with a limit, where this process may make one."""
    if limit_mib is None:
        return None
    try:
        return LimitedGroup(limit_mib)
    except FileAccessError:
        return None


def _is_out_of_memory(done: subprocess.CompletedProcess[bytes]) -> bool:
    return done.returncode == -9 or any(words in done.stderr for words in _OUT_OF_MEMORY)


def enter(arguments: list[str]) -> None:
    """Begin such a process: offer it to the kernel's OOM killer, and take the limit on its command line."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if arguments:
        limit = int((float(arguments[0]) + _SLACK_MIB) * (1 << 20))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
