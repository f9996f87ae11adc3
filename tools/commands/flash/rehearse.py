"""``fleetune flash rehearse``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command, add_emulated
from fleetune.tools.text import say


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "rehearse",
        summary="flash an emulated board, and see it become a member of a fleet and train",
        description=(
            "Rehearse what a flashed board goes through, without one: build package and image, make a seed, boot them\n"
            "on an emulated Cortex-A57 with 2 GB, and wait until it has enrolled, measured itself, and trained rounds\n"
            "that an aggregator here accepts. All that takes part is real: Mosquitto with certificates, an authority,\n"
            "systemd and its limits on the board. With --cut the power is cut in the midst of the first boot. With\n"
            "--then a build is released to the board afterwards, which takes it, or goes back to what it had.\n\n"
            "Needs the `flash` extra, qemu-system-arm, mosquitto, mtools, and what `fleetune flash image` needs; and\n"
            "the `pack` extra where no --pack is given."
        ),
        examples=(
            "  fleetune flash rehearse\n"
            "  fleetune flash rehearse --pack packs/minilm --budget 256\n"
            "  fleetune flash rehearse --cut measure --json | jq .agent\n"
            "  fleetune flash rehearse --then images/fleetune_0.2.0+t4_arm64.build.json\n"
        ),
    )
    parser.add_argument("--budget", metavar="MIB", type=int, default=192, help="of the device (default: %(default)s)")
    parser.add_argument("--memory", metavar="MIB", type=int, default=2048, help="of the board (default: %(default)s)")
    parser.add_argument("--cut", metavar="STEP", help="step of the first boot in which the power is cut once")
    parser.add_argument(
        "--then",
        metavar="BUILD",
        type=Path,
        action="append",
        default=[],
        help="record of a build of tier t4 that is released to the board afterwards; repeatable",
    )
    add_emulated(parser, "runs/rehearsal")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import time

    from fleetune.edge.protocol.errors import ConfigError, RunFailedError
    from fleetune.tools.require import require_flash_extra

    require_flash_extra()
    from fleetune.tools.emulator.board import TIER, make_board_image
    from fleetune.tools.firstboot.steps import STEPS
    from fleetune.tools.flash.record import check_record
    from fleetune.tools.flash.rehearse import Rehearsal, rehearse

    if args.cut not in (None, *STEPS[1:]):
        raise ConfigError(f"--cut: there is no step {args.cut} to be cut off in", f"choose from {', '.join(STEPS[1:])}")
    for option, value in (("--budget", args.budget), ("--memory", args.memory)):
        if not 16 <= value <= 65536:
            raise ConfigError(f"{option}: {value} is out of range", "choose from 16 to 65536 MiB")
    for record in args.then:
        if (tier := check_record(record).tier) != TIER:
            raise ConfigError(f"--then: {record} is of tier {tier}", "build it: `fleetune flash build --tier t4`")
    start = time.monotonic()

    def told(words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        say(f"{minutes:2d}:{seconds:02d}  {words}")

    made = make_board_image(args.images, args.pack, args.data, told)
    what = Rehearsal(made, args.memory, args.budget, args.cut, tuple(args.then))
    report = rehearse(what, args.out, told)
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()  # noqa: T201
    else:
        agent = report["agent"]
        print(  # noqa: T201
            f"{len(report['accepted'])} updates accepted; the agent's memory peaked at {agent['memory_peak_mib']:.0f} "
            f"of {agent['memory_max_mib']:.0f} MiB, {agent['killed_for_memory']} processes killed for it: {args.out}"
        )
    if bad := [record for record, done in zip(args.then, report["releases"], strict=True) if not done["good"]]:
        raise RunFailedError(
            f"--then: the agent does not come up with {', '.join(map(str, bad))}; the board went back",
            f"see {args.out / 'journal.log'}, and do not publish it",
        )
