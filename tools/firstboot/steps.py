"""The steps of a first boot. Each may be cut off anywhere and done again: it ends in the same state."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerUnreachableError, ConfigError, RunFailedError
from fleetune.edge.protocol.files import make_folder, read_bytes, write_atomic
from fleetune.edge.protocol.identity.folder import FILE as IDENTITY_FILE
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Disconnected, Link, Refused
from fleetune.edge.protocol.messages import Presence, shortened
from fleetune.edge.protocol.topics import Topics
from fleetune.profiles.fleet import PROFILE_ENDING, Fleet, fleet_files
from fleetune.profiles.profile import read_profile
from fleetune.tools.commands.options import IDENTITY
from fleetune.tools.firstboot.board import PROVISIONED, Board, as_user
from fleetune.tools.firstboot.grow import grow_root
from fleetune.tools.firstboot.seed import FLEET_FILE, MAX_FILE, SEED_FILE, read_seed, seed_files
from fleetune.tools.firstboot.source import opened, shred
from fleetune.tools.places import AGENT
from fleetune.tools.programs import find_program

log = logging.getLogger(__name__)

_MEASURED = "measured.yaml"
_UNITS = Path("etc/systemd/system")
_UNIT, _LIMIT = _UNITS / AGENT, _UNITS / f"{AGENT}.d/50-budget.conf"
_WANTED = _UNITS / "multi-user.target.wants" / AGENT
_BUDGET = """\
# What this device may spend, from its fleet file, and some room for what the kernel counts beside it.
[Service]
MemoryMax={mib}M
"""
_ROOM = 1.25
_SAY_WITHIN_S = 60.0

STEPS = ("grow", "seed", "enrol", "look", "measure", "unit", "report", "provisioned")
"""Their names, in the order in which they are done."""

Fleetune = Callable[..., str]
"""Runs a command of Fleetune's and returns what it printed."""


@dataclass(frozen=True)
class Step:
    """One of them.

    Attributes:
        name: In the journal.
        run: Does it, and says what came of it.
    """

    name: str
    run: Callable[[Board], str]


def first_boot(board: Board, steps: tuple[Step, ...]) -> None:
    """Do the steps that are not done yet.

    Raises:
        FleetuneError: A step cannot be done now; those before it stay done.
    """
    make_folder(board.state)
    board.state.chmod(0o700)
    board.give(board.state)
    done = board.done()
    for step in steps:
        if step.name in done:
            continue
        log.info("%s", step.name)
        came = step.run(board)
        board.finish(step.name, came)
        log.info("%s: %s", step.name, came)


# --- the steps ------------------------------------------------------------------------------------------------------


def grow(board: Board) -> str:
    """Let the root file system have the whole disk."""
    return grow_root(board.root)


def take_seed(board: Board) -> str:
    """Copy the seed into the board's own folder, if it is meant for this board.

    Raises:
        ConfigError: There is none, it is damaged, or another board's.
    """
    with opened(board) as folder:
        if folder is None:
            if (board.own / SEED_FILE).exists():
                return f"{board.seed.device}, from before"
            raise ConfigError(
                "this board has no seed",
                "write one to a partition or a USB stick: `fleetune flash seed`, docs/flashing.md",
            )
        seed = read_seed(read_bytes(folder / SEED_FILE, MAX_FILE), str(folder / SEED_FILE))
        if seed.serial is not None and board.serial != seed.serial:
            this = board.serial or "one without a number"
            raise ConfigError(
                f"the seed of {seed.device} is for the board {seed.serial}, and this is {this}",
                "give each board its own: the serial numbers are in the inventory",
            )
        for name in seed_files(folder):
            board.keep(name, read_bytes(folder / name, MAX_FILE))
    board.fleet.device(seed.device)
    return seed.device


def enrol(board: Board, fleetune: Fleetune) -> str:
    """Make this board's keys, and have the fleet's authority sign them. A token that was used is shredded.

    Raises:
        RunFailedError: Nobody answers, or the token counts no more.
    """
    seed, folder = board.seed, board.state / IDENTITY
    held = read_identity(folder).credential if (folder / IDENTITY_FILE).exists() else None
    if held is None or (held.fleet, held.name) != (seed.fleet, seed.device):
        if not board.token.exists():
            raise ConfigError("the seed has no token", "make another: `fleetune flash seed --renew`")
        fleetune("enroll", "--token", str(board.token), "--state", str(board.state))
    shred(board.own)
    with opened(board) as source:
        if source is not None:
            shred(source)
    return f"{seed.device} belongs to {seed.fleet}"


def look(board: Board, fleetune: Fleetune) -> str:
    """Have the doctor look at the board.

    Raises:
        RunFailedError: Something is wrong with it.
    """
    seed = board.seed
    said = fleetune(
        *("doctor", "--json", "--state", str(board.state), "--pack", seed.pack),
        *("--broker", seed.broker, "--fleet", str(board.fleet_file), "--id", seed.device),
    )
    board.keep("doctor.json", said.encode())
    return "well"


def measure(board: Board, fleetune: Fleetune) -> str:
    """Measure what training costs here, and let the fleet file name that profile.

    Raises:
        RunFailedError: It cannot be measured.
    """
    seed, fleet = board.seed, board.fleet
    device = fleet.device(seed.device)
    if device.profile.measured:
        return f"the profile {device.profile.name} has it already"
    out, own = board.state / _MEASURED, next(board.own.glob(f"[!.]*{PROFILE_ENDING}"), None)
    out.unlink(missing_ok=True)  # of a run that was cut off
    fleetune("profile", "--pack", seed.pack, "--out", str(out), "--board", str(own or device.profile.name))
    profile = msgspec.structs.replace(read_profile(str(out)), name=device.profile.name)
    files = fleet_files(Fleet(fleet.name, (msgspec.structs.replace(device, profile=profile),)))
    for name in sorted(files, key=lambda name: name == FLEET_FILE):  # the last: it names the others
        board.keep(name, files[name])
    out.unlink()
    return f"the profile {profile.name}"


def install_unit(board: Board, fleetune: Fleetune) -> str:
    """Write the agent's unit, let it start at every boot, and keep it within the device's budget.

    Raises:
        RunFailedError: The command line of the agent is not valid.
    """
    seed = board.seed
    text = fleetune(
        *("agent", "--unit", "--id", seed.device, "--fleet", str(board.fleet_file), "--pack", seed.pack),
        *("--data", seed.data, "--broker", seed.broker, "--state", str(board.state)),
    )
    budget = board.fleet.device(seed.device).budget.memory_mib
    write_atomic(board.root / _UNIT, text.encode(), mode=0o644)
    write_atomic(board.root / _LIMIT, _BUDGET.format(mib=int(budget * _ROOM)).encode(), mode=0o644)
    wanted = board.root / _WANTED
    wanted.parent.mkdir(parents=True, exist_ok=True)
    if not wanted.is_symlink():
        wanted.symlink_to(f"/{_UNIT}")
    if _has_systemd(board):
        _run([_systemctl(), "daemon-reload"])
    return f"/{_UNIT}, at most {budget * _ROOM:.0f} MiB"


def report(board: Board) -> str:
    """Tell the fleet that this board is a member, and that its agent has not started yet.

    Raises:
        BrokerUnreachableError: The broker does not take it.
    """
    seed = board.seed
    identity = read_identity(board.state / IDENTITY)
    topics = Topics(seed.fleet)
    topic = topics.presence(seed.device)
    word = Presence(seed.device, "offline", 0, version("fleetune"), shortened("provisioned, and starts its agent"))
    broker, me = BrokerAddress.parse(seed.broker), f"{seed.fleet}-{seed.device}"
    link = Link(broker, me, subscriptions=[topics.down(seed.device, "+")], seals=Seals(identity))
    try:
        link.connect(_SAY_WITHIN_S)
        link.say(topic, word, retain=True)
        ends = time.monotonic() + _SAY_WITHIN_S
        while not link.idle:
            for event in link.events(0.1):
                if isinstance(event, Refused | Disconnected):
                    raise BrokerUnreachableError(f"{broker} does not take {topic}", "see its log and its ACL")
            if time.monotonic() > ends:
                raise BrokerUnreachableError(f"{broker} does not answer", "see its log")
    finally:
        link.close()
    return seed.broker


def provision(board: Board) -> str:
    """From now on the agent starts, and first boot no more."""
    file = board.state / PROVISIONED
    write_atomic(file, f"{board.seed.device}\n".encode())
    board.give(file)
    if _has_systemd(board):  # it waits for this to be over; after a power cut here it starts with the next boot
        _run([_systemctl(), "--no-block", "start", AGENT])
    return str(file)


def all_steps(fleetune: Fleetune) -> tuple[Step, ...]:
    """In the order in which they are done."""
    run: tuple[Callable[[Board], str], ...] = (
        grow,
        take_seed,
        *(partial(step, fleetune=fleetune) for step in (enrol, look, measure, install_unit)),
        report,
        provision,
    )
    return tuple(Step(name, step) for name, step in zip(STEPS, run, strict=True))


def run_fleetune(board: Board, *arguments: str) -> str:
    """Run a command as the agent's user, and return what it printed.

    Raises:
        RunFailedError: It fails; with what it says.
    """
    return _run([sys.executable, "-m", "fleetune.tools.cli", *arguments], **as_user(board))


def _run(command: list[str], **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", **options
    )
    if done.returncode:
        what, _, remedy = done.stderr.strip().rpartition("error: ")[2].partition("remedy: ")
        raise RunFailedError(
            f"{' '.join(command[2:4])} ended with {done.returncode}: {(what.strip() or done.stdout)[-2000:]}",
            remedy.strip() or "see journalctl -u fleetune-firstboot",
        )
    return str(done.stdout)


def _has_systemd(board: Board) -> bool:
    return (board.root / "run/systemd/system").exists()


def _systemctl() -> str:
    return find_program("systemctl", "systemd")
