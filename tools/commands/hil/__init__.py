"""``fleetune hil``: hardware-in-the-loop tests."""

from __future__ import annotations

from typing import Any

from fleetune.tools.commands.hil import environments, farm, run, shell
from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = add_command(
        subparsers,
        "hil",
        summary="test boards, emulated and real: faults, memory, updates, with labgrid",
        description=(
            "Hardware-in-the-loop tests with labgrid: one suite for boards that are emulated and for those in a lab.\n"
            "It boots them, looks at them, has them train, and does to them what the field does: power cuts, links\n"
            "that come and go, full disks, wrong clocks, heat, neighbours that take memory, releases that fail."
        ),
        examples=(
            "  fleetune hil run --env qemu-nano-2g                    an emulated Jetson Nano, on this machine\n"
            "  fleetune hil rig --inventory fleet.yaml --pack packs/minilm --data reviews.jsonl --host 192.168.1.10\n"
            "  fleetune hil env --inventory fleet.yaml                an environment for each board of the lab\n"
            "  fleetune hil run --all                                 all of them, side by side\n"
            "  sudo fleetune hil farm --boards 2                      a mixed fleet of emulated boards trains\n"
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in (run, environments, farm, shell):
        action.register(actions)
