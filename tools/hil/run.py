"""Runs the suite on boards, each in a pytest of its own, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.tools.documents import from_json

TESTS = (
    "test_boot.py",
    "test_doctor.py",
    "test_state.py",
    "test_console.py",
    "test_broker.py",
    "test_training.py",
    "test_faults.py",
    "test_update.py",
)
"""In this order: what a later one needs, an earlier one has looked at."""

SUITE = Path(__file__).with_name("suite")

RESULTS, JUNIT, LOG = "results.json", "junit.xml", "pytest.log"
MEASURED = "measured.yaml"
"""A profile with what the board has measured, kept by a test."""

_FINE = {0, 1, 5}
"""Exit codes of pytest that tell of tests: all passed, some failed, none was chosen."""

TOLD = "board: "
"""How a line begins in which a test run says what is being done."""

_OUTCOMES = (" PASSED", " FAILED", " SKIPPED", " ERROR")
_MAX_RESULTS = 1 << 22


class Figure(msgspec.Struct, frozen=True):
    """What a test measured."""

    value: float
    unit: str


class Result(msgspec.Struct, frozen=True):
    """What came of a test.

    Attributes:
        outcome: ``passed``, ``failed``, ``error``: what it needs could not be had or taken away, or ``skipped``.
        seconds: How long it took, with what it needed.
        why: Of one that did not pass.
        figures: Name → what it measured.
    """

    outcome: str
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Figure] = {}


class Results(msgspec.Struct, frozen=True):
    """Of one board."""

    schema: int
    tests: dict[str, Result]


@dataclass(frozen=True)
class Target:
    """A board to run on.

    Attributes:
        name: Of the device.
        environment: Labgrid's.
        rig: The fleet's own side.
        build: Record of what it was flashed with; None if that is not here.
        measured: Where the profile that it measures is kept for boards of its kind; None for nowhere.
    """

    name: str
    environment: Path
    rig: Path
    build: Path | None = None
    measured: Path | None = None


def run_suite(
    targets: Sequence[Target],
    out: Path,
    *,
    options: Sequence[str] = (),
    say: Callable[[str], None],
) -> dict[str, Results]:
    """Run it.

    Args:
        targets: On which boards.
        out: Folder; each board gets one in it.
        options: More of pytest's.
        say: Called with the outcome of each test.

    Returns:
        Board → what came of its tests.

    Raises:
        RunFailedError: pytest itself failed on a board.
    """
    running = dict[str, subprocess.Popen[str]]()
    try:
        for target in targets:
            running[target.name] = _start(target, out / target.name, options)
        with ThreadPoolExecutor(len(targets)) as pool:
            for name, process in running.items():
                prefix = f"{name}: " if len(targets) > 1 else ""
                pool.submit(_follow, process, out / name / LOG, prefix, say)
    finally:  # each brings its board into a known state
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    for name, process in running.items():
        if process.returncode not in _FINE:
            log = out / name / LOG
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RunFailedError(f"{name}: pytest ended with {process.returncode}: {''.join(last)}", f"see {log}")
    found = {}
    for target in targets:
        file = out / target.name / RESULTS
        measured = out / target.name / MEASURED
        if target.measured is not None and measured.exists():
            write_atomic(target.measured, measured.read_bytes())
        found[target.name] = from_json(read_bytes(file, _MAX_RESULTS), Results, str(file), "run the suite again")
    return found


def _start(target: Target, out: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, JUNIT, LOG, MEASURED):
        (out / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *(str(SUITE / name) for name in TESTS), "--verbose", "--color=no"]
    command += ["-p", "no:cacheprovider", "-o", f"junit_suite_name={target.name}", "--lg-log", str(out.resolve())]
    command += ["--lg-env", str(target.environment.resolve()), "--rig", str(target.rig.resolve())]
    command += ["--results", str((out / RESULTS).resolve()), "--junitxml", str((out / JUNIT).resolve())]
    if target.build is not None:
        command += ["--build", str(target.build.resolve())]
    return subprocess.Popen(
        [*command, *options],
        cwd=out,
        env={name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "LG_ENV")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # or it would be interrupted twice, the second time while it clears up
        text=True,
        errors="replace",
    )


def _follow(process: subprocess.Popen[str], log: Path, prefix: str, say: Callable[[str], None]) -> None:
    """Write down what a pytest says, and say the outcomes."""
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if (told := _told(line)) is not None:
                say(f"{prefix}{told}")


def _told(line: str) -> str | None:
    """What people want to see of a line: what is being done, or what came of a test, without its folder."""
    if line.startswith(TOLD):
        return line.removeprefix(TOLD).strip()
    where, _, test = line.partition("::")
    return f"{where.rpartition('/')[2]}::{test}".strip() if any(outcome in test for outcome in _OUTCOMES) else None
