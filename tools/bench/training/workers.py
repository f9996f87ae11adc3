"""Processes that are measured: each answers one request after the other, so that several can take turns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.bench.training.round_worker import RoundSpec
from fleetune.tools.bench.training.spec import Spec

REST_S = 0.3
"""Seconds between two turns, in which the threads of the last one go to sleep."""


def engine_command(place: Path, name: str, spec: Spec) -> list[str]:
    """How to start Fleetune's worker; what it is to do is written to ``place``."""
    return [sys.executable, "-m", "fleetune.tools.bench.training.engine_worker", _write(place, name, spec)]


def rate_command(threads: int) -> list[str]:
    """How to start the worker that says how fast the machine multiplies matrices."""
    return [sys.executable, "-m", "fleetune.tools.bench.training.rate_worker", str(threads)]


def round_command(place: Path, spec: RoundSpec) -> list[str]:
    """How to start the worker that does rounds as an agent does."""
    file = place / "round.json"
    write_atomic(file, msgspec.json.encode(spec))
    return [sys.executable, "-m", "fleetune.tools.bench.training.round_worker", str(file)]


def peft_command(place: Path, name: str, spec: Spec, python: Path) -> list[str]:
    """How to start a peer, with the interpreter of its own environment."""
    return [str(python), str(Path(__file__).with_name("peft_worker.py")), _write(place, name, spec)]


def _write(place: Path, name: str, spec: Spec) -> str:
    file = place / f"{name.replace(' ', '-').replace(',', '')}.json"
    write_atomic(file, msgspec.json.encode(spec))
    return str(file)


class Worker:
    """A process that trains; it reads a JSON object a line on its input and answers with one a line.

    Args:
        name: What it is, for people.
        command: Its command line.
        log: Gets what it writes on standard error.

    Attributes:
        started_s: Seconds from its start until it was ready to train.

    Raises:
        RunFailedError: It ends before it is ready.
    """

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self._log = name, log
        start = time.perf_counter()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.ready = self._read()
        self.started_s = time.perf_counter() - start

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            RunFailedError: The process ends instead.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": request}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        raise RunFailedError(f"{self.name} ended with exit code {code}: {lines[-1]}", f"see {self._log}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
