"""Programs of a board that only print: run with a limit of time and of output, and without a terminal."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import time

from fleetune.edge.resources.probes.tree import Tree, reason

OUTPUT_LIMIT = 64 << 10
"""Bytes of a program's output that are read at most."""

_SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"


def find_command(name: str) -> str | None:
    """The path of a program, on PATH or where a user's PATH may not lead; None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_FOLDERS)


def run_command(tree: Tree, *command: str, lines: int | None = None, timeout_s: float = 5.0) -> str | None:
    """What a program prints; None where it is not installed.

    Args:
        tree: Where it is named if it fails, does not end in time or prints too much. What it has printed by then is
            returned all the same: some programs print their answer before they complain.
        command: Name and arguments. It is searched on PATH, and where a user's PATH may not lead.
        lines: End the program after so many lines; for one that goes on for ever.
        timeout_s: End it after so many seconds.
    """
    name = command[0]
    program = find_command(name)
    if program is None:
        return None
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C"},
            start_new_session=True,  # so that what it starts can be ended with it
        )
    except OSError as error:
        tree.skip(name, reason(error))
        return None
    with process:
        try:
            output, wrong = _read(process, lines, time.monotonic() + timeout_s)
            if wrong is None and lines is None:
                wrong = _status(process, timeout_s)
        finally:
            _end(process)
    text = output.decode(errors="replace")
    if wrong is not None:
        tree.skip(name, f"{wrong}: {text.strip()!r}" if text.strip() else wrong)
    return text


def _read(process: subprocess.Popen[bytes], lines: int | None, end: float) -> tuple[bytes, str | None]:
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while lines is None or output.count(b"\n") < lines:
            if not selector.select(max(0.0, end - time.monotonic())):
                return output, "did not end in time"
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                break
            output += piece
            if len(output) > OUTPUT_LIMIT:
                return output[:OUTPUT_LIMIT], f"printed more than {OUTPUT_LIMIT} bytes"
    return output, None


def _status(process: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return "did not end in time"
    return f"exit status {status}" if status else None


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has ended, and so has all that it started
