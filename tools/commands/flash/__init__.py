"""``fleetune flash``: what boards are flashed with."""

from __future__ import annotations

from typing import Any

from fleetune.tools.commands.flash import build, image, rehearse, seed, station, updates
from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = add_command(
        subparsers,
        "flash",
        summary="build what boards are flashed with",
        description=(
            "Build what boards are flashed with. One image serves a whole fleet: nothing in it is secret, and\n"
            "nothing in it belongs to one board; what does is that board's seed."
        ),
        examples=(
            "  fleetune flash build --tier t1 --pack packs/minilm      for Jetson Nano\n"
            "  fleetune flash seed --inventory fleet.yaml --pack minilm  who each board is\n"
            "  fleetune flash rehearse                                 all of it, on an emulated board\n"
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in (build, seed, station, updates, image, rehearse):
        action.register(actions)
