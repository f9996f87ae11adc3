"""What an emulated board says of itself while it runs: its first boot, its units, its agent's memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.profiles.fleet import PROFILE_ENDING
from fleetune.tools.emulator.board import EmulatedBoard
from fleetune.tools.emulator.machine import Machine
from fleetune.tools.firstboot.board import JOURNAL as FIRSTBOOT
from fleetune.tools.firstboot.board import PROVISIONED
from fleetune.tools.firstboot.steps import STEPS
from fleetune.tools.places import AGENT, STATE, UPDATE_TIMER
from fleetune.tools.rig import Rig
from fleetune.tools.waiting import wait_until

JOURNALED = "journal.log"
"""What the board's journal had in the end."""

BOOTS_WITHIN_S, PROVISIONED_WITHIN_S = 300.0, 1800.0

_GROUP = f"/sys/fs/cgroup/system.slice/{AGENT}"
_MIB = 1 << 20
_TRIES = 3

log = logging.getLogger(__name__)


@contextmanager
def explained(board: Machine) -> Iterator[None]:
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


def wait_first_boot(board: Machine, rig: Rig, until: str | None) -> None:
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
        state = properties(board, "fleetune-firstboot.service", "NRestarts")
        if int(state["NRestarts"]) >= _TRIES:
            said = board.guest.run(
                "/usr/bin/journalctl", "--unit=fleetune-firstboot", "--output=cat", "--lines=20"
            ).stdout
            raise RunFailedError(f"the first boot fails again and again: {said.strip()}", f"see {board.folder}")
        return False

    late = RunFailedError(f"the first boot was not over in {PROVISIONED_WITHIN_S:.0f} s", f"see {board.folder}")
    wait_until(is_there, PROVISIONED_WITHIN_S, lambda: late, every_s=1.0)


def keep_measured(running: Machine, board: EmulatedBoard, file: Path) -> None:
    """Keep the profile that a board has measured in its first boot, for others of its kind.

    Raises:
        RunFailedError: It has measured nothing.
    """
    found = running.guest.run("/bin/cat", f"/{STATE}/board/{board.device.profile.name}{PROFILE_ENDING}")
    if found.returncode:
        raise RunFailedError(f"{board.name} has measured nothing: {found.stderr.strip()}", f"see {running.folder}")
    write_atomic(file, found.stdout.encode())


def wait_for_unit(board: Machine, unit: str, states: tuple[str, ...], within_s: float) -> None:
    """Wait until a unit is in one of these states."""

    def is_so() -> bool:
        board.check()
        return properties(board, unit, "ActiveState")["ActiveState"] in states

    late = RunFailedError(f"{unit} was not {' or '.join(states)} in {within_s:.0f} s", f"see {board.folder}")
    wait_until(is_so, within_s, lambda: late, every_s=1.0)


def properties(board: Machine, unit: str, *names: str) -> dict[str, str]:
    """Properties of a systemd unit."""
    said = board.guest.run("/usr/bin/systemctl", "show", unit, f"--property={','.join(names)}").stdout
    return dict(line.split("=", 1) for line in said.splitlines())


def _done(board: Machine) -> set[str]:
    said = board.guest.run("/bin/cat", f"/{STATE}/{FIRSTBOOT}")
    return set(json.loads(said.stdout)["done"]) if said.returncode == 0 else set()


def look(board: Machine) -> dict[str, Any]:
    """What the board itself says of its agent."""
    state = properties(board, AGENT, "ActiveState", "User", "MemoryMax", "NRestarts")
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
        "looks_for_releases": properties(board, UPDATE_TIMER, "ActiveState")["ActiveState"] == "active",
        "root_mib": int(size),
        "first_boot": json.loads(board.guest.run("/bin/cat", f"/{STATE}/{FIRSTBOOT}").stdout)["done"],
    }
