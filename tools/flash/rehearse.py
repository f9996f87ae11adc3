"""A fleet's flashing, rehearsed: an emulated board boots the image, takes its seed, becomes a member and trains.

Then, if wanted, releases are published to it, and it takes them or goes back.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFailedError, RunFolderError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.emulator.board import TIER, BoardImage, EmulatedBoard, flash_board
from fleetune.tools.emulator.machine import DISK, Machine, machine
from fleetune.tools.firstboot.board import JOURNAL as FIRSTBOOT
from fleetune.tools.firstboot.board import PROVISIONED
from fleetune.tools.firstboot.steps import STEPS
from fleetune.tools.places import AGENT, STATE, UPDATE_TIMER, UPDATER
from fleetune.tools.release.publish import publish
from fleetune.tools.release.repository import Releases
from fleetune.tools.rig import Rig, open_rig
from fleetune.tools.trees import SHORT
from fleetune.tools.waiting import wait_until

FLEET, DEVICE = "rehearsal", "nano"
REPORT = "rehearsal.json"
JOURNALED = "journal.log"
"""What the board's journal had in the end."""

_GROUP = f"/sys/fs/cgroup/system.slice/{AGENT}"
_JOB = ("--classes", "2", "--global-rounds", "1", "--personal-rounds", "1", "--batch", "8", "--max-depth", "2")
_BOOTS_WITHIN_S, _PROVISIONED_WITHIN_S, _TRAINED_WITHIN_S, _RELEASED_WITHIN_S = 300.0, 900.0, 900.0, 1800.0
_MIB = 1 << 20
_TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed.

    Attributes:
        made: What boots, its pack and its samples.
        memory_mib: The board's.
        budget_mib: The device's.
        cut: Step of the first boot in which the power is cut once; None for none.
        then: Records of builds that are released one after the other, once the board has trained.
    """

    made: BoardImage
    memory_mib: int = 2048
    budget_mib: int = 192
    cut: str | None = None
    then: tuple[Path, ...] = ()


def rehearse(what: Rehearsal, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Boot one board, and let it train a round.

    Args:
        what: What is rehearsed.
        out: Folder for keys, logs, the board's disk and the report; that of an earlier rehearsal is replaced.
        say: Called with what happens.

    Returns:
        The report.

    Raises:
        ConfigError: A program is missing.
        RunFailedError: A step did not come to its end.
    """
    _clear(out)
    start = time.monotonic()
    seconds: dict[str, float] = {}

    def reached(name: str, words: str) -> None:
        seconds[name] = round(time.monotonic() - start, 1)
        say(words)

    nano = EmulatedBoard(DEVICE, memory_mib=what.memory_mib, budget_mib=what.budget_mib)
    disks = flash_board(nano, what.made, FLEET, out, out)
    with open_rig(out, only_here=True) as rig:
        job = rig.serve(*_JOB)
        reached("disks", "seed and disk are made; the board starts")
        with machine(what.made.image, out, disks, memory_mib=what.memory_mib) as board, _explained(board):
            board.wait_up(_BOOTS_WITHIN_S)
            reached("up", "the board is up")
            if what.cut is not None:
                _wait(board, rig, what.cut)
                board.cut_power()
                reached("cut", f"power cut in step {what.cut}")
                board.wait_up(_BOOTS_WITHIN_S)
                reached("up_again", "the board is up again")
            _wait(board, rig, None)
            reached("provisioned", "the board is provisioned; its agent starts")
            accepted = [record.manifest for record in job.wait(_TRAINED_WITHIN_S, board.check)]
            reached("trained", "its rounds are done")
            found = _look(board)
            taken = []
            for record in what.then:
                taken.append(_release(record, rig, board))
                number, kit = taken[-1]["number"], taken[-1]["runs"]
                reached(f"release_{number}", f"the board {'runs' if taken[-1]['good'] else 'went back to'} kit {kit}")
    report = {
        "schema": 1,
        "seconds": seconds,
        "cut": what.cut,
        "pack": Pack.open(what.made.pack).sha256,
        "accepted": [{"job": update.job, "samples": update.samples, "metrics": update.metrics} for update in accepted],
        **found,
        "releases": taken,
    }
    write_atomic(out / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    (out / DISK).unlink()
    return report


def _clear(out: Path) -> None:
    """Make the folder; one of an earlier rehearsal is replaced, and no other."""
    if out.exists():
        if any(out.iterdir()) and not (out / "authority").is_dir():
            raise RunFolderError(f"--out: {out} is not empty, and no rehearsal's", "name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)


@contextmanager
def _explained(board: Machine) -> Iterator[None]:
    """Whatever goes wrong, the board's own log lies beside its console."""
    try:
        yield
    finally:
        try:
            said = board.guest.run("/usr/bin/journalctl", "--no-pager", "--output=short-monotonic", timeout_s=60.0)
        except (OSError, RunFailedError) as error:
            log.warning("the board does not give its log: %s", error)
        else:
            write_atomic(board.folder / JOURNALED, said.stdout.encode())


def _wait(board: Machine, rig: Rig, until: str | None) -> None:
    """Wait until a step of the first boot is being done, or all are."""

    def is_there() -> bool:
        rig.check()
        done = _done(board)
        if until is None and PROVISIONED in done:
            return True
        if until is not None and set(STEPS[: STEPS.index(until)]) <= done:
            if until in done:
                raise RunFailedError(f"step {until} was over before the power could be cut", "choose a longer one")
            return True
        state = _properties(board, "fleetune-firstboot.service", "NRestarts")
        if int(state["NRestarts"]) >= _TRIES:
            said = board.guest.run(
                "/usr/bin/journalctl", "--unit=fleetune-firstboot", "--output=cat", "--lines=20"
            ).stdout
            raise RunFailedError(f"the first boot fails again and again: {said.strip()}", f"see {board.folder}")
        return False

    late = RunFailedError(f"the first boot was not over in {_PROVISIONED_WITHIN_S:.0f} s", f"see {board.folder}")
    wait_until(is_there, _PROVISIONED_WITHIN_S, lambda: late, every_s=1.0)


def _done(board: Machine) -> set[str]:
    said = board.guest.run("/bin/cat", f"/{STATE}/{FIRSTBOOT}")
    return set(json.loads(said.stdout)["done"]) if said.returncode == 0 else set()


def _release(record: Path, rig: Rig, board: Machine) -> dict[str, Any]:
    """Publish a build, and let the board do what its timer does every hour."""
    with Releases(rig.releases) as releases:
        rollout = publish(releases, [record], [], [DEVICE], 0.0)
    start = time.monotonic()
    board.guest.run("/usr/bin/systemctl", "start", "--no-block", UPDATER)
    _wait_for(board, UPDATER, ("inactive", "failed"), _RELEASED_WITHIN_S)
    _wait_for(board, AGENT, ("active",), _RELEASED_WITHIN_S)
    seconds = round(time.monotonic() - start, 1)
    state = json.loads(board.guest.run("/usr/bin/fleetune", "update", "--show", timeout_s=_RELEASED_WITHIN_S).stdout)
    if rollout.number not in (state["good"], *state["bad"]):
        said = board.guest.run("/usr/bin/journalctl", f"--unit={UPDATER}", "--output=cat", "--lines=5").stdout
        raise RunFailedError(f"the board did not try release {rollout.number}: {said.strip()}", f"see {board.folder}")
    process = _properties(board, AGENT, "MainPID")["MainPID"]
    command = board.guest.run("/bin/cat", f"/proc/{process}/cmdline").stdout.split("\0")
    return {
        "number": rollout.number,
        "kit": rollout.kits[TIER].digest[:SHORT],
        "good": state["good"] == rollout.number,
        "runs": Path(command[0]).parent.parent.name,
        "seconds": seconds,
    }


def _wait_for(board: Machine, unit: str, states: tuple[str, ...], within_s: float) -> None:
    """Wait until a unit is in one of these states."""

    def is_so() -> bool:
        board.check()
        return _properties(board, unit, "ActiveState")["ActiveState"] in states

    late = RunFailedError(f"{unit} was not {' or '.join(states)} in {within_s:.0f} s", f"see {board.folder}")
    wait_until(is_so, within_s, lambda: late, every_s=1.0)


def _properties(board: Machine, unit: str, *names: str) -> dict[str, str]:
    said = board.guest.run("/usr/bin/systemctl", "show", unit, f"--property={','.join(names)}").stdout
    return dict(line.split("=", 1) for line in said.splitlines())


def _look(board: Machine) -> dict[str, Any]:
    """What the board itself says of its agent."""
    state = _properties(board, AGENT, "ActiveState", "User", "MemoryMax", "NRestarts")
    events = dict(line.split() for line in board.guest.run("/bin/cat", f"{_GROUP}/memory.events").stdout.splitlines())
    size = board.guest.run("/bin/df", "--block-size=1M", "--output=size", "/").stdout.split()[-1]
    return {
        "agent": {
            "state": state["ActiveState"],
            "user": state["User"],
            "restarts": int(state["NRestarts"]),
            "memory_max_mib": int(state["MemoryMax"]) / _MIB,
            "memory_peak_mib": round(int(board.guest.run("/bin/cat", f"{_GROUP}/memory.peak").stdout) / _MIB, 1),
            "killed_for_memory": int(events["oom_kill"]),
            "held_back_for_memory": int(events["max"]),
        },
        "looks_for_releases": _properties(board, UPDATE_TIMER, "ActiveState")["ActiveState"] == "active",
        "root_mib": int(size),
        "first_boot": json.loads(board.guest.run("/bin/cat", f"/{STATE}/{FIRSTBOOT}").stdout)["done"],
    }
