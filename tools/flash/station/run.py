"""Flashes the boards of a plan, and keeps in the ledger what became of each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fleetune.edge.protocol.files import FolderLock
from fleetune.tools.flash.station.ledger import Ledger
from fleetune.tools.flash.station.plan import Command, Job, Plan


@dataclass(frozen=True)
class Flashed:
    """What became of a board.

    Attributes:
        device: Its id.
        serial: Its serial number, where the inventory has one.
        where: The USB port, or the card.
        code: Exit status of the command that failed; 0 without one. None: done before, by an earlier run.
        log: What the programs said; None if nothing was run.
    """

    device: str
    serial: str | None
    where: str
    code: int | None
    log: Path | None


def run_plan(plan: Plan, ledger: Ledger, say: Callable[[str], None], *, again: bool = False) -> list[Flashed]:
    """Flash what is not done yet.

    Args:
        plan: The boards.
        ledger: What was done to them.
        say: Called as boards begin and end, from several threads.
        again: Flash those too that are done.

    Returns:
        What became of each board, in the order of the plan.

    Raises:
        RunFolderError: Another run works with the same package of NVIDIA's.
    """
    with ExitStack() as stack:
        held = [ledger.held]
        if plan.bsp is not None:  # NVIDIA's programs work in one folder
            lock = stack.enter_context(closing(FolderLock(plan.bsp.path, remedy="wait until that run is over")))
            held.append(lock.fileno)
        return _run(plan, ledger, _Runner(plan, ledger, say, tuple(held)), again=again)


def _run(plan: Plan, ledger: Ledger, runner: _Runner, *, again: bool) -> list[Flashed]:
    todo = [job for job in plan.jobs if again or ledger.state(job.device.id, job.image) != "done"]
    if plan.shared:
        if len(todo) not in (0, len(plan.jobs)):
            todo = list(plan.jobs)  # the program takes whatever is connected
        done = runner.together(todo) if todo else []
    else:
        with ThreadPoolExecutor(max_workers=max(1, plan.at_once)) as pool:
            done = list(pool.map(runner.alone, todo))
    found = {one.device: one for one in done}
    return [
        found.get(job.device.id) or Flashed(job.device.id, job.device.serial, job.where, None, None)
        for job in plan.jobs
    ]


class _Runner:
    def __init__(self, plan: Plan, ledger: Ledger, say: Callable[[str], None], held: tuple[int, ...]) -> None:
        self._plan, self._ledger, self._say = plan, ledger, say
        self._lock, self._held = Lock(), held

    def alone(self, job: Job) -> Flashed:
        """One board, with commands of its own."""
        log, code = self._begin(job), 0
        try:
            for command in job.commands:
                code = self._call(command, log)
                if code:
                    break
        finally:
            for command in job.after:
                code = self._call(command, log) or code
        return self._end(job, log, code)

    def together(self, jobs: list[Job]) -> list[Flashed]:
        """All boards, with one command: which of them failed it does not say, so all of them have to be done again."""
        logs = [self._begin(job) for job in jobs]
        code = self._call(self._plan.shared, logs[0])
        for log in logs[1:]:
            log.write_bytes(logs[0].read_bytes())
        return [self._end(job, log, code) for job, log in zip(jobs, logs, strict=True)]

    def _begin(self, job: Job) -> Path:
        with self._lock:
            state = self._ledger.state(job.device.id, job.image)
            again = {"interrupted": ", which an earlier run broke off", "failed": ", which failed before"}.get(
                state, ""
            )
            self._say(f"{job.device.id} at {job.where}{again}")
            return self._ledger.begin(job.device.id, job.device.serial, job.where, job.image)

    def _end(self, job: Job, log: Path, code: int) -> Flashed:
        with self._lock:
            self._ledger.end(job.device.id, code)
            self._say(f"{job.device.id} at {job.where}: {f'failed with {code}, see {log}' if code else 'done'}")
        return Flashed(job.device.id, job.device.serial, job.where, code, log)

    def _call(self, command: Command, log: Path) -> int:
        with log.open("ab") as out:
            out.write(f"+ {' '.join(command)}\n".encode())
            out.flush()
            try:
                return subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    check=False,
                    cwd=self._plan.bsp.path if self._plan.bsp else None,  # NVIDIA's programs want their own folder
                    pass_fds=self._held,  # so that nobody begins beside it where this process is killed
                ).returncode
            except OSError as error:
                out.write(f"{command[0]}: {error.strerror}\n".encode())
                return 127
