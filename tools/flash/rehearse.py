"""A fleet's flashing, rehearsed: an emulated board boots the image, takes its seed, becomes a member and trains.

Then, if wanted, releases are published to it, and it takes them or goes back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.emulator.board import TIER, BoardImage, EmulatedBoard, clear_folder, flash_boards, measured_file
from fleetune.tools.emulator.machine import DISK, Machine, machine
from fleetune.tools.emulator.observe import (
    BOOTS_WITHIN_S,
    explained,
    keep_measured,
    look,
    properties,
    wait_first_boot,
    wait_for_unit,
)
from fleetune.tools.places import AGENT, UPDATER
from fleetune.tools.release.publish import publish
from fleetune.tools.release.repository import Releases
from fleetune.tools.rig import SMALL, Rig, open_rig
from fleetune.tools.trees import SHORT

FLEET, DEVICE = "rehearsal", "nano"
REPORT = "rehearsal.json"
_JOB = (*SMALL, "--max-depth", "2")
_TRAINED_WITHIN_S, _RELEASED_WITHIN_S = 900.0, 1800.0


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
        The report. What the board has measured is kept among the images, for farms and tests.

    Raises:
        ConfigError: A program is missing.
        RunFailedError: A step did not come to its end.
    """
    clear_folder(out, "authority")
    start = time.monotonic()
    seconds: dict[str, float] = {}

    def reached(name: str, words: str) -> None:
        seconds[name] = round(time.monotonic() - start, 1)
        say(words)

    nano = EmulatedBoard(DEVICE, memory_mib=what.memory_mib, budget_mib=what.budget_mib)
    (disks,) = flash_boards([nano], what.made, FLEET, out, [out])
    with open_rig(out, listen="127.0.0.1") as rig:
        job = rig.serve(*_JOB)
        reached("disks", "seed and disk are made; the board starts")
        with machine(what.made.image, out, disks, memory_mib=what.memory_mib) as board, explained(board):
            board.wait_up(BOOTS_WITHIN_S)
            reached("up", "the board is up")
            if what.cut is not None:
                wait_first_boot(board, rig, what.cut)
                board.cut_power()
                reached("cut", f"power cut in step {what.cut}")
                board.wait_up(BOOTS_WITHIN_S)
                reached("up_again", "the board is up again")
            wait_first_boot(board, rig, None)
            reached("provisioned", "the board is provisioned; its agent starts")
            keep_measured(board, nano, measured_file(nano, what.made))
            accepted = [record.manifest for record in job.wait(_TRAINED_WITHIN_S, board.check)]
            reached("trained", "its rounds are done")
            found = look(board)
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


def _release(record: Path, rig: Rig, board: Machine) -> dict[str, Any]:
    """Publish a build, and let the board do what its timer does every hour."""
    with Releases(rig.releases) as releases:
        rollout = publish(releases, [record], [], [DEVICE], 0.0)
    start = time.monotonic()
    # Its timer may have started the updater before: that one has not seen the release.
    board.guest.run("/usr/bin/systemctl", "restart", UPDATER, timeout_s=_RELEASED_WITHIN_S)
    wait_for_unit(board, AGENT, ("active",), _RELEASED_WITHIN_S)
    seconds = round(time.monotonic() - start, 1)
    state = json.loads(board.guest.run("/usr/bin/fleetune", "update", "--show", timeout_s=_RELEASED_WITHIN_S).stdout)
    if rollout.number not in (state["good"], *state["bad"]):
        said = board.guest.run("/usr/bin/journalctl", f"--unit={UPDATER}", "--output=cat", "--lines=5").stdout
        raise RunFailedError(f"the board did not try release {rollout.number}: {said.strip()}", f"see {board.folder}")
    process = properties(board, AGENT, "MainPID")["MainPID"]
    command = board.guest.run("/bin/cat", f"/proc/{process}/cmdline").stdout.split("\0")
    return {
        "number": rollout.number,
        "kit": rollout.kits[TIER].digest[:SHORT],
        "good": state["good"] == rollout.number,
        "runs": Path(command[0]).parent.parent.name,
        "seconds": seconds,
    }
