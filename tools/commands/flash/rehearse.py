"""``fleetune flash rehearse``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command
from fleetune.tools.text import say

if TYPE_CHECKING:
    from fleetune.tools.emulator.image import Image


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
            "systemd and its limits on the board. With --cut the power is cut in the midst of the first boot.\n\n"
            "Needs the `flash` extra, qemu-system-arm, mosquitto, mtools, and what `fleetune flash image` needs; and\n"
            "the `pack` extra where no --pack is given."
        ),
        examples=(
            "  fleetune flash rehearse\n"
            "  fleetune flash rehearse --pack packs/minilm --budget 256\n"
            "  fleetune flash rehearse --cut measure --json | jq .agent\n"
        ),
    )
    parser.add_argument(
        "--pack", metavar="DIR", type=Path, help="(default: two small blocks of random weights: an emulator is slow)"
    )
    parser.add_argument(
        "--data", metavar="FILE", type=Path, help="the board's samples, of two classes (default: reviews of films)"
    )
    parser.add_argument("--budget", metavar="MIB", type=int, default=192, help="of the device (default: %(default)s)")
    parser.add_argument("--memory", metavar="MIB", type=int, default=2048, help="of the board (default: %(default)s)")
    parser.add_argument("--cut", metavar="STEP", help="step of the first boot in which the power is cut once")
    parser.add_argument(
        "--images", metavar="DIR", type=Path, default=Path("images"), help="where images are (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/rehearsal"),
        help="report, logs and the board's console (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import time

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.require import require_flash_extra

    require_flash_extra()
    from fleetune.tools.demo.task import Task
    from fleetune.tools.emulator.toy import write_toy_pack
    from fleetune.tools.firstboot.steps import STEPS
    from fleetune.tools.flash.rehearse import Rehearsal, rehearse

    if args.cut not in (None, *STEPS[1:]):
        raise ConfigError(f"--cut: there is no step {args.cut} to be cut off in", f"choose from {', '.join(STEPS[1:])}")
    for option, value in (("--budget", args.budget), ("--memory", args.memory)):
        if not 16 <= value <= 65536:
            raise ConfigError(f"{option}: {value} is out of range", "choose from 16 to 65536 MiB")
    start = time.monotonic()

    def told(words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        say(f"{minutes:2d}:{seconds:02d}  {words}")

    args.images.mkdir(parents=True, exist_ok=True)
    task = Task("text", None, train=64, val=32, test=32, seed=0)
    pack, data = args.pack or args.images / "toy", args.data or args.images / "samples.jsonl"
    if args.pack is None and not pack.is_dir():
        told("the pack")
        write_toy_pack(pack)
    if args.data is None:
        task.write_data([data])
    image = _image(pack, args.images, told)
    report = rehearse(Rehearsal(image, pack, data, args.memory, args.budget, args.cut), args.out, told)
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()  # noqa: T201
        return
    agent = report["agent"]
    print(  # noqa: T201
        f"{len(report['accepted'])} updates accepted; the agent's memory peaked at {agent['memory_peak_mib']:.0f} of "
        f"{agent['memory_max_mib']:.0f} MiB, {agent['killed_for_memory']} processes killed for it: {args.out}"
    )


def _image(pack: Path, images: Path, told: Any) -> Image:
    from fleetune.edge.pack.pack import Pack
    from fleetune.tools.emulator.image import make_image
    from fleetune.tools.flash.build import MAINTAINER, build
    from fleetune.tools.flash.tier import find_tier

    Pack.open(pack)
    hashes = build(find_tier("t4"), images, packs=[pack], maintainer=MAINTAINER, say=told)
    (deb,) = (images / name for name in hashes if name.endswith(".deb"))
    return make_image(deb, images, told)
