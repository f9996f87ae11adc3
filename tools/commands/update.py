"""``fleetune update``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command
from fleetune.tools.text import say


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "update",
        summary="take the newest release that reaches this board, and go back if it does not come up",
        description=(
            "What a flashed board does every hour (fleetune-update.timer): it looks for a release that reaches it,\n"
            "unpacks it beside what it runs, lets the agent start with it, and keeps it once the agent is up. If it\n"
            "does not come up, the release before runs again, and this one is left out from then on. A power cut may\n"
            "come at any time. Run it as root."
        ),
        examples="  fleetune update\n  fleetune update --show          what runs, is tried, or did not come up\n",
    )
    parser.add_argument(
        "--within",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds that the agent has to come up (default: %(default)s: it may have to measure anew)",
    )
    parser.add_argument("--show", action="store_true", help="only say what runs")
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.tools.documents import to_json
    from fleetune.tools.places import MANIFEST, UPDATES
    from fleetune.tools.update.state import read_state

    root = args.root.resolve()
    folder = root / UPDATES
    if args.show:
        print(to_json(read_state(folder)).decode().rstrip())  # noqa: T201
        return
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.edge.protocol.files import read_bytes
    from fleetune.tools.firstboot.board import Board as Flashed
    from fleetune.tools.firstboot.seed import MAX_FILE, RELEASES_FILE
    from fleetune.tools.manifest import read_manifest
    from fleetune.tools.update.services import Systemd
    from fleetune.tools.update.update import Board, update

    flashed = Flashed(root)
    seed, trusted = flashed.seed, flashed.own / RELEASES_FILE
    if seed.releases is None or not trusted.is_file():
        raise ConfigError(
            "this board's seed names no releases", "make seeds with `fleetune flash seed --releases`, docs/flashing.md"
        )
    image = read_manifest(root)
    if image is None:
        raise ConfigError(f"{root / MANIFEST} is missing", "flash the board: docs/flashing.md")
    board = Board(folder, seed.device, image.tier, seed.releases, read_bytes(trusted, MAX_FILE))
    print(update(board, Systemd(), within_s=args.within, say=say))  # noqa: T201
