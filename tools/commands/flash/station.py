"""``fleetune flash plan``, ``preflight``, ``run`` and ``card``: at the machine where boards are flashed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command, add_inventory
from fleetune.tools.text import say

if TYPE_CHECKING:
    from fleetune.tools.flash.station.ledger import State
    from fleetune.tools.flash.station.plan import Plan
    from fleetune.tools.flash.station.preflight import Station

_WAYS = (
    "ways:\n"
    "  card    SD cards, each in a reader of its own, written side by side and read back\n"
    "  usb     Jetson Nano in recovery mode, NVIDIA's flash.sh, one after the other\n"
    "  initrd  Orin in recovery mode, NVIDIA's l4t_initrd_flash.sh, all boards at once"
)


def register(actions: Any) -> None:
    """Add the actions."""
    plan = add_command(
        actions,
        "plan",
        summary="which board becomes which device, and by which commands",
        description=(
            "Say which boards are connected, which devices of the inventory they become (by serial number, or as --at\n"
            "says), what the ledger knows of them, and the very commands that `run` would run. Nothing is touched.\n\n"
            + _WAYS
        ),
        examples=_EXAMPLES.format("plan"),
    )
    check = add_command(
        actions,
        "preflight",
        summary="look for what is known to go wrong, before any board is touched",
        description=(
            "Check boards, NVIDIA's package, this machine and its room for what is known to go wrong, with a remedy\n"
            "each. Leaves with 47 if something would.\n\n" + _WAYS
        ),
        examples=_EXAMPLES.format("preflight"),
    )
    run = add_command(
        actions,
        "run",
        summary="flash boards, and keep a ledger of them",
        description=(
            "Flash the boards of a plan, if its preflight finds nothing. The ledger has a line as each board begins\n"
            "and ends, with serial number, hash of the image, exit status and log; the same command again leaves out\n"
            "those that are done, and does those that failed or were broken off.\n\n" + _WAYS
        ),
        examples=_EXAMPLES.format("run") + "  fleetune flash run … --dry-run\n",
    )
    for parser in (plan, check, run):
        _add_wanted(parser)
    run.add_argument("--dry-run", action="store_true", help="print the very commands, and run none")
    run.add_argument("--again", action="store_true", help="flash those too that are done")
    for parser in (plan, check, run):
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    plan.set_defaults(run=_plan)
    check.set_defaults(run=_preflight)
    run.set_defaults(run=_run)
    _register_card(actions)


_EXAMPLES = (
    "  fleetune flash {0} --inventory fleet.yaml --way card --image nano.img --seeds seeds --at /dev/sdb=nano-1\n"
    "  fleetune flash {0} --inventory fleet.yaml --way initrd --bsp Linux_for_Tegra \\\n"
    "      --board jetson-orin-nano-devkit --storage internal --at 1-2.1=orin-1 --at 1-2.2=orin-2\n"
)


def _add_wanted(parser: argparse.ArgumentParser) -> None:
    add_inventory(parser)
    parser.add_argument("--way", required=True, choices=("card", "usb", "initrd"), help="how boards are flashed")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="WHERE=ID",
        help="which device the board at a USB port becomes, or the card in a reader; may be given several times",
    )
    parser.add_argument("--seeds", metavar="DIR", type=Path, help="what `fleetune flash seed` made")
    parser.add_argument("--image", metavar="FILE", type=Path, help="card: raw, or compressed with its .bmap beside it")
    parser.add_argument("--qspi", metavar="N", type=int, help="card: release of L4T in the boards' QSPI memory")
    parser.add_argument("--bsp", metavar="DIR", type=Path, help="usb, initrd: Linux_for_Tegra")
    parser.add_argument("--board", metavar="NAME", default="", help="usb, initrd: the board's name there")
    parser.add_argument(
        "--storage", metavar="NAME", default="mmcblk0p1", help="usb, initrd: what is flashed (default: %(default)s)"
    )
    parser.add_argument("--erase", action="store_true", help="initrd: erase everything first, the boot slots too")
    parser.add_argument(
        "--ledger", metavar="DIR", type=Path, default=Path("ledger"), help="what was done (default: %(default)s)"
    )
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("/"), help=argparse.SUPPRESS)


def _made(args: argparse.Namespace) -> tuple[Plan, Station, dict[str, State]]:
    """The plan, the machine, and where each device stands."""
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.fleet import read_fleet
    from fleetune.tools.flash.station.boards import boards_in_recovery
    from fleetune.tools.flash.station.ledger import read_ledger, state_of
    from fleetune.tools.flash.station.plan import Wanted, make_plan
    from fleetune.tools.flash.station.preflight import Station

    at = dict[str, str]()
    for words in args.at:
        where, _, device = words.rpartition("=")
        if not where or not device or where in at:
            raise ConfigError(f"--at: {words} is not WHERE=ID, or is there twice", "such as --at 1-2.1=nano-1")
        at[where] = device
    entries = list(read_ledger(args.ledger))
    devices = read_fleet(args.inventory).devices
    wanted = Wanted(args.way, devices, at, args.seeds, args.image, args.bsp, args.board, args.storage, erase=args.erase)
    plan = make_plan(wanted, boards_in_recovery(args.root), entries)
    states = {job.device.id: state_of(entries, job.device.id, job.image) for job in plan.jobs}
    return plan, Station(args.root, os.geteuid(), args.qspi), states


def _plan(args: argparse.Namespace) -> None:
    plan, _, states = _made(args)
    if args.json:
        boards = [
            {
                "device": job.device.id,
                "serial": job.device.serial,
                "where": job.where,
                "state": states[job.device.id],
                "commands": [shlex.join(command) for command in (*job.commands, *job.after)],
            }
            for job in plan.jobs
        ]
        document = {"way": plan.way, "image": plan.image, "boards": boards, "shared": shlex.join(plan.shared)}
        print(json.dumps(document, indent=1))  # noqa: T201
        return
    print(f"image {plan.image[:12]}, {len(plan.jobs)} boards")  # noqa: T201
    for job in plan.jobs:
        print(f"{job.where:16} {job.device.id:24} {job.device.serial or '-':20} {states[job.device.id]}")  # noqa: T201
    _print_commands(plan)


def _print_commands(plan: Plan, done: Collection[str] = ()) -> None:
    todo = [job for job in plan.jobs if job.device.id not in done]
    shared = plan.shared if todo else ()
    for command in [*(command for job in todo for command in (*job.commands, *job.after)), shared]:
        if command:
            print(shlex.join(command))  # noqa: T201


def _preflight(args: argparse.Namespace) -> int:
    from fleetune.tools.doctor.host import as_text, exit_code
    from fleetune.tools.flash.station.preflight import preflight

    plan, station, _ = _made(args)
    checks = []
    for check in preflight(plan, station):
        checks.append(check)
        if not args.json:
            print(as_text(check), flush=True)  # noqa: T201
    if args.json:
        print(json.dumps([check._asdict() for check in checks], indent=1))  # noqa: T201
    return exit_code(checks)


def _run(args: argparse.Namespace) -> int:
    from contextlib import closing
    from dataclasses import asdict

    from fleetune.edge.protocol.errors import RunFailedError
    from fleetune.tools.doctor.host import as_text, exit_code
    from fleetune.tools.flash.station.ledger import Ledger
    from fleetune.tools.flash.station.preflight import preflight
    from fleetune.tools.flash.station.run import run_plan

    plan, station, states = _made(args)
    if args.dry_run:
        _print_commands(plan, set() if args.again else {device for device, state in states.items() if state == "done"})
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was staged for one board is taken away
        signal.signal(number, signal.default_int_handler)
    with closing(Ledger(args.ledger)) as ledger:
        checks = list(preflight(plan, station))
        for check in checks:
            if check.verdict != "ok":
                sys.stderr.write(f"{as_text(check)}\n")
        if code := exit_code(checks):
            return code
        flashed = run_plan(plan, ledger, say, again=args.again)
    if args.json:
        rows = [asdict(one) | {"log": None if one.log is None else str(one.log)} for one in flashed]
        print(json.dumps(rows, indent=1))  # noqa: T201
    else:
        for one in flashed:
            state = "done before" if one.code is None else "done" if one.code == 0 else f"failed with {one.code}"
            print(f"{one.where:16} {one.device:24} {one.serial or '-':20} {state}")  # noqa: T201
    if failed := [f"{one.device} (serial number {one.serial or 'unknown'})" for one in flashed if one.code]:
        raise RunFailedError(
            f"{len(failed)} of {len(flashed)} boards are not flashed: {', '.join(failed)}",
            f"see {args.ledger}/logs; the same command again does those alone",
        )
    return 0


def _register_card(actions: Any) -> None:
    parser = add_command(
        actions,
        "card",
        summary="write one SD card, read it back, and put a seed into it",
        description=(
            "Write an image to an SD card with bmaptool, read all that was written back from the card, and put a seed\n"
            "into its root file system, which is not mounted for that. `run --way card` does it for many.\n\n"
            "Needs bmap-tools, fdisk and e2fsprogs."
        ),
        examples="  fleetune flash card nano.img /dev/sdb --seed seeds/nano-1\n",
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="raw, or compressed with its .bmap beside it")
    parser.add_argument("card", metavar="CARD", type=Path, help="the device, or a file that stands for one")
    parser.add_argument("--seed", metavar="DIR", type=Path, help="of the board: seeds/ID")
    parser.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.flash.station.card import write_card

    if not args.image.is_file():
        raise ConfigError(f"{args.image}: no such file", "name the image for the card")
    write_card(args.image, args.card, args.seed, say)
