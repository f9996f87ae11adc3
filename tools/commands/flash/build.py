"""``fleetune flash build``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command
from fleetune.tools.text import say


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "build",
        summary="a Debian package, an overlay for a root file system, and their bill of materials",
        description=(
            "Build, for one kind of system, what makes a board a device: a Debian package, and the same content as\n"
            "an overlay to unpack into Linux_for_Tegra/rootfs or a Yocto root file system. Both hold Fleetune, the\n"
            "wheels that it needs there (arm64, each pinned by hash), the units that run it, and packs if you name\n"
            "some. The same content gives the same bytes, whenever and wherever it is built.\n\n"
            "tiers:\n"
            "  t1  Ubuntu 22.04 on L4T r32 (Jetson Nano)\n"
            "  t2  JetPack 6 (Orin)\n"
            "  t3  JetPack 7 (Orin)\n"
            "  t4  Debian 12, Raspberry Pi OS 12, and what is emulated\n\n"
            "Needs the `flash` extra and dpkg-deb."
        ),
        examples=(
            "  fleetune flash build --tier t1\n"
            "  fleetune flash build --tier t1 --pack packs/minilm --out images\n"
            "  fleetune flash build --tier t2 --wheel onnxruntime_gpu-1.23.0-cp310-cp310-linux_aarch64.whl\n"
            "  fleetune fleet sign images/fleetune_0.1.0+t1_arm64.build.json\n"
        ),
    )
    parser.add_argument("--tier", required=True, metavar="TIER", help="what the boards run: t1, t2, t3 or t4")
    parser.add_argument(
        "--pack",
        dest="packs",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a pack that comes along, in /usr/share/fleetune/packs; may be given several times",
    )
    parser.add_argument(
        "--wheel",
        dest="wheels",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a wheel in place of the pinned one, such as NVIDIA's onnxruntime-gpu; may be given several times",
    )
    parser.add_argument(
        "--maintainer",
        metavar="NAME",
        default="Fleet operator <root@localhost>",
        help="who answers for the package, with an address (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("images"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the files and their hashes as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.pack.pack import Pack
    from fleetune.tools.require import require_flash_extra

    require_flash_extra()
    from fleetune.tools.flash.build import build
    from fleetune.tools.flash.record import read_record
    from fleetune.tools.flash.tier import find_tier

    tier = find_tier(args.tier)
    for pack in args.packs:
        Pack.open(pack)
    record = build(tier, args.out, packs=args.packs, own_wheels=args.wheels, maintainer=args.maintainer, say=say)
    hashes = read_record(record).files
    if args.json:
        print(json.dumps({"out": str(args.out), "files": hashes}, indent=2))  # noqa: T201
        return
    for name, digest in hashes.items():
        print(f"{digest}  {args.out / name}")  # noqa: T201
