"""``fleetune firstboot``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "firstboot",
        summary="make of a board that was flashed a member of its fleet",
        description=(
            "What a flashed board does when it starts for the first time (fleetune-firstboot.service): it lets its\n"
            "file system grow, takes its seed, enrols with keys that it makes itself, shreds the token, has the\n"
            "doctor look at it, measures what training costs, writes the agent's unit and reports to the fleet. Each\n"
            "step is kept in STATE/firstboot.json; the same command again goes on where it was cut off. Run it as\n"
            "root."
        ),
        examples="  fleetune firstboot\n  fleetune firstboot --show          which steps are done\n",
    )
    parser.add_argument("--user", default="fleetune", help="who the agent runs as (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="only say what is done")
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from functools import partial

    from fleetune.tools.firstboot.board import Board
    from fleetune.tools.firstboot.steps import all_steps, first_boot, run_fleetune

    board = Board(args.root.resolve(), args.user or None)
    if not args.show:
        first_boot(board, all_steps(partial(run_fleetune, board)))
    for step, came in board.done().items():
        print(f"{step:12} {came}")  # noqa: T201
