"""``fleetune hil farm``."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command, add_emulated
from fleetune.tools.network import FAST_KBIT
from fleetune.tools.text import columns, say

if TYPE_CHECKING:
    from fleetune.tools.hil.farm import Farm

_MOST = 16


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "farm",
        summary="rehearse a mixed fleet on emulated boards, each with a network of its own",
        description=(
            "Start emulated boards, each in a network namespace of its own, on one broker: 2 GB and 4 GB in turn, and\n"
            "every other one with CPU seconds for one block only. A depth is planned for each from what one board has\n"
            "measured; then they train, and the farm fails if one trains another depth than was planned.\n"
            "With --rate the wires are slow. With --stay the boards stay up afterwards, for jobs of yours.\n\n"
            "Needs root, for the networks, and what `fleetune hil run` needs. What was measured is kept in --images:\n"
            "the first farm takes some minutes longer."
        ),
        examples=(
            "  sudo fleetune hil farm --boards 2\n"
            "  sudo fleetune hil farm --boards 4 --rate 64 --json | jq .devices\n"
            "  sudo fleetune hil farm --stay\n"
        ),
    )
    parser.add_argument("--boards", metavar="N", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--rate",
        metavar="KBIT",
        type=int,
        default=FAST_KBIT,
        help="what a wire lets through, kbit/s (default: %(default)s)",
    )
    parser.add_argument("--stay", action="store_true", help="leave the boards up until Ctrl-C")
    add_emulated(parser, "runs/hil-farm")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError, RunFailedError
    from fleetune.tools.require import require_hil_extra

    require_hil_extra()
    from fleetune.tools.emulator.board import make_board_image
    from fleetune.tools.hil.emulated import check_programs
    from fleetune.tools.hil.farm import REPORT, as_planned, rehearse_farm
    from fleetune.tools.network import check_networks

    for option, value, most in (("--boards", args.boards, _MOST), ("--rate", args.rate, 10_000_000)):
        if not 1 <= value <= most:
            raise ConfigError(f"{option}: {value} is out of range", f"choose from 1 to {most}")
    check_programs()
    check_networks()

    def then(farm: Farm, report: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps(report, indent=1), flush=True)  # noqa: T201
        else:
            print(f"{columns(_rows(report))}\n{args.out / REPORT}", flush=True)  # noqa: T201
        if args.stay:
            _stay(farm)

    made = make_board_image(args.images, args.pack, args.data, say)
    report = rehearse_farm(
        args.boards,
        made,
        args.out,
        rate_kbit=args.rate,
        say=say,
        then=then,
    )
    if not as_planned(report):
        raise RunFailedError("a device has not trained the depth that was planned for it", f"see {args.out / REPORT}")


def _rows(report: dict[str, Any]) -> list[list[str]]:
    rows = [["device", "profile", "planned depth", "trained", "peak MiB", "predicted", "CPU s", "predicted", "KiB up"]]
    for name, device in report["devices"].items():
        rounds = device["rounds"]
        rows.append(
            [
                name,
                device["profile"],
                str(device["plan"]["depth"]),
                " ".join(str(one["depth"]) for one in rounds),
                f"{max((one['peak_mib'] for one in rounds), default=0):.0f}",
                f"{max((one['plan_peak_mib'] for one in rounds), default=0):.0f}",
                f"{max((one['cpu_s'] for one in rounds), default=0):.1f}",
                f"{max((one['plan_cpu_s'] for one in rounds), default=0):.1f}",
                f"{sum(one['bytes'] for one in rounds) / 1024:.0f}",
            ]
        )
    return rows


def _stay(farm: Farm) -> None:
    """Until somebody ends it."""
    from fleetune.server.authority.founding import AGGREGATOR_FOLDER

    rig = farm.rig
    say(
        f"{len(farm.machines)} boards stay up until Ctrl-C; their consoles: {rig.folder.parent}/*/console.log. Try:\n"
        f"  fleetune serve --fleet {rig.folder}/fleet.yaml --pack {rig.pack} --broker {rig.address} "
        f"--identity {rig.authority / AGGREGATOR_FOLDER} --state runs/mine --classes 2"
    )
    while True:
        farm.check()
        time.sleep(1.0)
