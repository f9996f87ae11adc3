"""``fleetune hil run``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command, add_emulated
from fleetune.tools.text import columns, say

if TYPE_CHECKING:
    from fleetune.tools.hil.run import Target


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "run",
        summary="run the suite on one board, or on all",
        description=(
            "Run the suite. An emulated board is built, flashed and started here, with a fleet of its own. A board of\n"
            "a lab needs its labgrid environment, and the rig of the same name that its seed came from. Boards are\n"
            "tested side by side, each by a pytest of its own. A test that needs what a board does not have is\n"
            "skipped, and says so.\n\n"
            "With --without each test of a fault runs with the protection that it tests switched off, and has to fail."
        ),
        examples=(
            "  fleetune hil run --env qemu-nano-2g\n"
            "  fleetune hil run --env qemu-nano-2g --tests 'power or link' --without\n"
            "  fleetune hil run --env hil/nano-1.yaml --build images/fleetune_0.2.0+t1_arm64.build.json\n"
            "  fleetune hil run --all --json | jq .boards\n"
        ),
    )
    parser.add_argument(
        "--env",
        dest="environments",
        action="append",
        default=[],
        metavar="ENV",
        help="qemu-nano-2g, qemu-nano-4g, or a labgrid environment; repeatable",
    )
    parser.add_argument(
        "--all",
        nargs="?",
        const=Path("hil"),
        metavar="DIR",
        type=Path,
        help="all environments in a folder (default: hil, where `fleetune hil env` writes them)",
    )
    parser.add_argument(
        "--rigs", metavar="DIR", type=Path, default=Path("rigs"), help="of a lab's boards (default: %(default)s)"
    )
    parser.add_argument("--build", metavar="RECORD", type=Path, help="what a lab's boards were flashed with")
    parser.add_argument("--tests", metavar="EXPRESSION", help="only tests that pytest's -k chooses")
    parser.add_argument("--without", action="store_true", help="switch off what each test of a fault tests")
    add_emulated(parser, "runs/hil")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError, RunFailedError
    from fleetune.tools.require import require_hil_extra

    require_hil_extra()
    from fleetune.tools.hil.emulated import BOARDS
    from fleetune.tools.hil.report import PAGE, REPORT, first_failure, summary, write_report
    from fleetune.tools.hil.run import LOG, run_suite

    names = [*args.environments, *(map(str, sorted(args.all.glob("*.yaml"))) if args.all else ())]
    if not names:
        where = f"--all: {args.all} has no environments" if args.all else "no board is named"
        remedy = "or write environments: `fleetune hil env --inventory fleet.yaml`"
        raise ConfigError(where, f"--env {', --env '.join(BOARDS)}, {remedy}")
    if args.build is not None and not args.build.is_file():
        raise ConfigError(f"--build: there is no {args.build}", "name a record, *.build.json: `fleetune flash build`")
    targets = [_target(name, args) for name in dict.fromkeys(names)]
    if twins := [name for name, count in Counter(target.name for target in targets).items() if count > 1]:
        raise ConfigError(f"two environments are of {twins[0]}", "name one of them: a board is tested once at a time")
    options = [*(["-k", args.tests] if args.tests else []), *(["--without"] if args.without else [])]
    found = run_suite(targets, args.out, options=options, say=say)
    good = write_report(found, args.out)
    if args.json:
        sys.stdout.write((args.out / REPORT).read_text(encoding="utf-8"))
    else:
        print(f"{columns(summary(found))}\n{args.out / PAGE}")  # noqa: T201
    if not any(results.tests for results in found.values()):
        raise ConfigError(f"--tests: {args.tests!r} chooses no test", "see docs/hil.md, what is tested")
    if args.without:
        tests = [(f"{name}: {test}", one) for name, results in found.items() for test, one in results.tests.items()]
        for outcome, words, remedy in (
            ("error", "could not be tried", f"see {args.out / PAGE}"),
            ("passed", "passes without what it tests", "the test has to be mended"),
        ):
            if such := [test for test, one in tests if one.outcome == outcome]:
                raise RunFailedError(f"{words}: {'; '.join(such)}", remedy)
        if all(one.outcome == "skipped" for _, one in tests):
            raise RunFailedError("no test of a fault was tried", f"see {args.out / PAGE}")
    elif not good:
        raise RunFailedError(first_failure(found), f"see {args.out / PAGE}, and {LOG} of a board beside it")


def _target(name: str, args: argparse.Namespace) -> Target:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.hil.emulated import BOARDS
    from fleetune.tools.hil.environment import read_environment
    from fleetune.tools.hil.run import Target

    if name in BOARDS:
        return _emulated(name, args)
    file = Path(name)
    if not file.is_file():
        where = Path("hil", f"{name}.yaml")
        others = f"name its environment: {where}" if where.is_file() else f"name a file, or {', '.join(BOARDS)}"
        raise ConfigError(f"--env: there is no {name}", others)
    device = read_environment(file)
    rig = args.rigs / device
    if not rig.is_dir():
        raise ConfigError(f"--rigs: there is no {rig}, for the device of {file}", "make it: `fleetune hil rig`")
    return Target(device, file, rig, args.build)


def _emulated(name: str, args: argparse.Namespace) -> Target:
    """Build, flash and prepare it."""
    from dataclasses import replace

    from fleetune.tools.emulator.board import make_board_image, measured_file
    from fleetune.tools.hil.emulated import BOARDS, check_programs, set_up
    from fleetune.tools.hil.run import Target

    check_programs()
    made = make_board_image(args.images, args.pack, args.data, say)
    board = BOARDS[name]
    measured = measured_file(board, made)
    if measured.exists():
        board = replace(board, profile=str(measured.resolve()))
    place = set_up(board, made, args.out / name)
    return Target(name, place.environment, place.rig, made.record, measured)
