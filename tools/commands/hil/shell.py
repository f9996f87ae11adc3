"""``fleetune hil shell``."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command, add_images
from fleetune.tools.text import say


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "shell",
        summary="open a board's console: the emulated one, or one of a lab",
        description=(
            "Open the console of a board. An emulated one is built and started for it, with its seed, but without a\n"
            "fleet that it could reach; Ctrl-A X ends it. One of a lab is opened by labgrid-client."
        ),
        examples="  fleetune hil shell\n  fleetune hil shell --env hil/nano-1.yaml\n",
    )
    parser.add_argument(
        "--env", dest="environment", metavar="ENV", default="qemu-nano-2g", help="(default: %(default)s)"
    )
    add_images(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/hil/shell"),
        help="the board's disk (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError, RunFailedError
    from fleetune.tools.require import require_hil_extra

    require_hil_extra()
    from fleetune.tools.emulator.board import make_board_image
    from fleetune.tools.emulator.machine import console_command
    from fleetune.tools.hil.emulated import BOARDS, check_programs, set_up
    from fleetune.tools.programs import find_program

    if args.environment in BOARDS:
        check_programs()
        board = BOARDS[args.environment]
        made = make_board_image(args.images, None, None, say)
        place = set_up(board, made, args.out)
        command = console_command(made.image, place.disks, memory_mib=board.memory_mib)
    elif Path(args.environment).is_file():
        command = [find_program("labgrid-client", "labgrid"), "--config", args.environment, "console"]
    else:
        raise ConfigError(
            f"--env: there is no {args.environment}", f"choose from {', '.join(BOARDS)}, or name a labgrid environment"
        )
    if code := subprocess.run(command, check=False).returncode:
        raise RunFailedError(f"{command[0]} ended with {code}", "see what it said")
