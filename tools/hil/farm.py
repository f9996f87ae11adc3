"""A mixed fleet without boards: emulated ones, each in a network namespace of its own, on one broker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.messages import UpdateManifest
from fleetune.edge.resources.limits import LIMITS, Budget
from fleetune.edge.resources.workload import Workload
from fleetune.profiles.fleet import PROFILE_ENDING
from fleetune.profiles.profile import read_profile, write_profile
from fleetune.tools.emulator.board import BoardImage, EmulatedBoard, clear_folder, flash_boards, measured_file
from fleetune.tools.emulator.machine import Machine, machine
from fleetune.tools.emulator.observe import BOOTS_WITHIN_S, explained, keep_measured, wait_first_boot
from fleetune.tools.hil.emulated import BOARDS
from fleetune.tools.network import FAST_KBIT, Network
from fleetune.tools.plan.answer import Answer, answer
from fleetune.tools.rig import CLASSES, Rig, open_rig

FLEET, RIG, REPORT = "farm", "rig", "report.json"
MEASURING = "measuring"
"""Folder of the board that measures for the others."""

BATCH = 8
GLOBAL_ROUNDS, PERSONAL_ROUNDS = 2, 1
_TRAINED_WITHIN_S = 1800.0


@dataclass(frozen=True)
class Farm:
    """Boards that run, and are members of their fleet.

    Attributes:
        rig: The fleet's own side.
        network: Their wires.
        machines: Device → its board.
    """

    rig: Rig
    network: Network
    machines: dict[str, Machine]

    def check(self) -> None:
        """See that all of it still runs.

        Raises:
            RunFailedError: Something does not.
        """
        self.rig.check()
        for running in self.machines.values():
            running.check()


@contextmanager
def open_farm(
    boards: Sequence[EmulatedBoard], made: BoardImage, out: Path, say: Callable[[str], None]
) -> Iterator[Farm]:
    """Flash boards, start them, and wait until each is a member of the fleet; they stop with the block.

    Args:
        boards: Which.
        made: What they start from.
        out: Folder for the rig, and for a folder of each board.
        say: Called with what happens.

    Raises:
        ConfigError: A program is missing, or this is not root.
        RunFailedError: A board does not come up, or its first boot fails.
    """
    folders = [out / board.name for board in boards]
    for folder in folders:
        folder.mkdir(parents=True)
    with ExitStack() as stack:
        network = stack.enter_context(closing(Network([board.name for board in boards])))
        flashed = flash_boards(boards, made, FLEET, out / RIG, folders, network.address)
        rig = stack.enter_context(open_rig(out / RIG, listen=network.address))
        farm = Farm(rig, network, {})
        for board, folder, disks in zip(boards, folders, flashed, strict=True):
            within = partial(network.command, board.name)
            starts = machine(made.image, folder, disks, memory_mib=board.memory_mib, within=within)
            farm.machines[board.name] = stack.enter_context(starts)
            stack.enter_context(explained(farm.machines[board.name]))
        for name, running in farm.machines.items():
            running.wait_up(BOOTS_WITHIN_S)
            say(f"{name} is up")
        for name, running in farm.machines.items():
            wait_first_boot(running, rig, None)
            say(f"{name} is a member of the fleet")
        yield farm


def rehearse_farm(
    count: int,
    made: BoardImage,
    out: Path,
    *,
    rate_kbit: int = FAST_KBIT,
    say: Callable[[str], None],
    then: Callable[[Farm, dict[str, Any]], None],
) -> dict[str, Any]:
    """Plan for a mixed fleet, and let it train: boards of two kinds, every other one with CPU seconds for one block.

    Args:
        count: Of boards.
        made: What they start from.
        out: Folder for all of it; that of an earlier farm is replaced.
        rate_kbit: What a wire lets through, in either direction.
        say: Called with what happens.
        then: Called once it has trained, with the farm and the report.

    Returns:
        The report.

    Raises:
        ConfigError: A program is missing, or this is not root.
        BudgetError: A board cannot train the pack.
        RunFailedError: A step did not come to its end.
    """
    clear_folder(out, RIG, MEASURING)
    kinds = list(islice(cycle(BOARDS.values()), count))
    profiles = _profiles(list(dict.fromkeys(kinds)), made, out, say)
    boards = [
        replace(kind, name=f"nano-{number}", profile=str(profiles[kind.name].resolve()))
        for number, kind in enumerate(kinds, start=1)
    ]
    boards[::2] = [replace(board, budget_cpu_s=_enough_for_one_block(board, made)) for board in boards[::2]]
    plans = {board.name: _planned(board, made).plan for board in boards}
    blocks = Pack.open(made.pack).manifest.blocks
    options = ["--classes", str(CLASSES), "--batch", str(BATCH), "--sal-start", str(blocks)]
    options += ["--global-rounds", str(GLOBAL_ROUNDS), "--personal-rounds", str(PERSONAL_ROUNDS)]
    with open_farm(boards, made, out, say) as farm:
        for name in farm.machines:
            farm.network.slow(name, rate_kbit)
        job = farm.rig.serve(*options)
        job.wait(_TRAINED_WITHIN_S, farm.check)
        say("its rounds are done")
        updates = [one.manifest for one in job.accepted() if one.manifest.payload is not None]
        report = {
            "schema": 1,
            "rate_kbit": rate_kbit,
            "devices": {
                board.name: {
                    "profile": board.device.profile.name,
                    "memory_mib": board.memory_mib,
                    "budget": _limits(board.device.budget),
                    "plan": msgspec.to_builtins(plans[board.name]),
                    "rounds": [_round(update) for update in updates if update.device == board.name],
                }
                for board in boards
            },
        }
        write_atomic(out / REPORT, json.dumps(report, indent=1).encode() + b"\n")
        then(farm, report)
    return report


def as_planned(report: dict[str, Any]) -> bool:
    """Whether each device has trained, in every round, the depth that was planned for it."""
    return all(
        device["rounds"] and {one["depth"] for one in device["rounds"]} == {device["plan"]["depth"]}
        for device in report["devices"].values()
    )


def _profiles(
    kinds: Sequence[EmulatedBoard], made: BoardImage, out: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """Kind of board → a profile with what training costs it. One measures for all: their processor is the same."""
    files = {kind.name: measured_file(kind, made) for kind in kinds}
    known = [file for file in files.values() if file.exists()]
    if not known:
        say(f"{kinds[0].name} measures what training costs such a processor, which takes minutes")
        _measure(kinds[0], made, files[kinds[0].name], out / MEASURING, say)
        known = [files[kinds[0].name]]
    measured = read_profile(str(known[0])).measured
    for kind in kinds:
        if not files[kind.name].exists():  # memory of another board is none that was measured on this one: not kept
            files[kind.name] = out / f"{kind.profile}{PROFILE_ENDING}"
            write_profile(files[kind.name], msgspec.structs.replace(read_profile(kind.profile), measured=measured))
    return files


def _measure(board: EmulatedBoard, made: BoardImage, kept: Path, out: Path, say: Callable[[str], None]) -> None:
    """Let a board measure what training costs it, and keep that."""
    with open_farm([board], made, out, say) as farm:
        keep_measured(farm.machines[board.name], board, kept)


def _planned(board: EmulatedBoard, made: BoardImage) -> Answer:
    pack, device = Pack.open(made.pack), board.device
    samples = read_dataset(made.samples, pack)
    asked = Workload.of(samples, pack.manifest, epochs=1, batch=BATCH, max_depth=pack.manifest.blocks)
    found = answer(board.name, device.profile, pack, asked, device.budget, threads=None, classes=CLASSES)
    if found.refusal is not None:
        raise found.refusal
    return found


def _enough_for_one_block(board: EmulatedBoard, made: BoardImage) -> float:
    """CPU seconds between what a round of one block takes, and one of two; no limit where the pack has one block."""
    (limit,) = (limit for limit in LIMITS if limit.name == "cpu")
    needs = dict[int, list[float]]()
    for option in _planned(board, made).options:
        needs.setdefault(option.plan.depth, []).append(limit.need(option.plan))
    return math.sqrt(min(needs[1]) * min(needs[2])) if 2 in needs else math.inf


def _limits(budget: Budget) -> dict[str, float]:
    return {name: value for name, value in msgspec.structs.asdict(budget).items() if value < math.inf}


def _round(update: UpdateManifest) -> dict[str, Any]:
    """What an update tells of its round."""
    assert update.payload is not None
    names = ("plan_peak_mib", "peak_mib", "plan_cpu_s", "cpu_s", "seconds", "stopped_for")
    return {
        "version": update.version,
        "depth": update.metrics["plan_depth"],
        "samples": update.samples,
        "bytes": update.payload.size,
        **{name: update.metrics[name] for name in names},
    }
