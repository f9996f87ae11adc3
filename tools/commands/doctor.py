"""``fleetune doctor``."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import IDENTITY, add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "doctor",
        summary="say what is wrong with this device, and how to mend it",
        description=(
            "Check this device: board, Python, glibc, wheels (each one computes), memory,\n"
            "disk, clock, heat, and on request a training step and the way to the broker\n"
            "and back. One line for each: ok, note (it works, but know this) or failure,\n"
            "with its fix. Leaves with the exit code of the first failure, 0 without one.\n"
            "Needs only the plain install; where that cannot be installed, the first three\n"
            "checks run alone, with any Python from 3.6 on: python3 tools/doctor/host.py.\n"
            "docs/doctor.md explains every check."
        ),
        examples=(
            "  fleetune doctor --state /var/lib/fleetune\n"
            "  fleetune doctor --pack packs/minilm                 also trains one step\n"
            "  fleetune doctor --broker mqtts://broker.local --fleet fleet.yaml --id nano-1 --state /var/lib/fleetune\n"
            "  ssh nano-1 fleetune doctor --json > nano-1.json     one document, for fleets\n"
        ),
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder of the agent's state, which need not exist yet (default: the current folder)",
    )
    parser.add_argument("--pack", metavar="DIR", type=Path, help="check this pack's hashes, and train one step of it")
    parser.add_argument("--broker", metavar="URL", help="send a message there and back; needs --fleet and --id")
    parser.add_argument(
        "--fleet", metavar="FLEET", help="the fleet file, or the fleet's name where there is no file yet"
    )
    parser.add_argument("--id", help="this device's id in the fleet file")
    parser.add_argument(
        "--identity", metavar="DIR", type=Path, help="folder of its identity (default: STATE/identity, if it is there)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=lambda args: _run(args, parser))


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fleetune.tools.doctor.examination import Subject, examine
    from fleetune.tools.doctor.host import as_document, as_text, exit_code, read_board

    given = (args.broker, args.fleet, args.id)
    if any(given) and not all(given):
        parser.error("--broker, --fleet and --id belong together")
    logging.getLogger("fleetune").setLevel(logging.ERROR)  # what goes wrong stands in a check's line
    board = read_board()
    checks = []
    enrolled = args.state / IDENTITY
    identity = args.identity or (enrolled if enrolled.is_dir() else None)
    for check in examine(Subject(board, args.state, args.pack, given if args.broker else None, identity)):
        checks.append(check)
        if not args.json:
            print(as_text(check), flush=True)  # noqa: T201
    if args.json:
        print(json.dumps(as_document(board, checks), indent=2))  # noqa: T201
    return exit_code(checks)
