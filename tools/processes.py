"""The run's processes: the same commands that a real fleet runs, each with a log of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fleetune.edge.protocol.errors import RunFailedError

_PATIENCE = 10.0
"""Seconds that a process gets to leave by itself."""


class Processes:
    """Starts ``fleetune`` commands and sees to it that none outlives the run."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self, name: str, log: Path, arguments: list[str]) -> None:
        """Start one; it gets a session of its own, so that Ctrl-C reaches only this process."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fleetune.tools.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._running[name] = (process, log)

    def ended(self, name: str) -> bool:
        """Whether a process came to its end, and a good one.

        Raises:
            RunFailedError: It failed; says what it wrote last.
        """
        process, log = self._running[name]
        code = process.poll()
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = next((line for line in reversed(lines) if line.startswith("error: ")), "".join(lines[-1:]))
            raise RunFailedError(
                f"{name} ended with exit code {code}: {last.removeprefix('error: ')}",
                f"see {log}; start the same command again to go on where the run stopped",
            )
        return code == 0

    def check(self) -> None:
        """Look after all of them.

        Raises:
            RunFailedError: One failed.
        """
        for name in self._running:
            self.ended(name)

    def stop(self, names: list[str] | None = None) -> None:
        """Ask processes to leave, all by default, and end those that do not; whoever has left is left alone."""
        stopping = [self._running.pop(name)[0] for name in names or list(self._running) if name in self._running]
        for process in stopping:
            process.terminate()
        for process in stopping:
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Processes that end with the block, whatever happens in it."""
    running = Processes()
    try:
        yield running
    finally:
        running.stop()
