"""``fleetune flash``: what boards are flashed with."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_authority, add_command
from fleetune.tools.text import utc


def register(subparsers: Any) -> None:
    """Add the command and its subcommands."""
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
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _register_build(actions)
    _register_seed(actions)


# --- build ------------------------------------------------------------------------------------------------------


def _register_build(actions: Any) -> None:
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
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> None:
    from fleetune.edge.pack.pack import Pack
    from fleetune.tools.require import require_flash_extra

    require_flash_extra()
    from fleetune.tools.flash.build import build
    from fleetune.tools.flash.tier import find_tier

    tier = find_tier(args.tier)
    for pack in args.packs:
        Pack.open(pack)
    hashes = build(tier, args.out, packs=args.packs, own_wheels=args.wheels, maintainer=args.maintainer, say=_progress)
    if args.json:
        print(json.dumps({"out": str(args.out), "files": hashes}, indent=2))  # noqa: T201
        return
    for name, digest in hashes.items():
        print(f"{digest}  {args.out / name}")  # noqa: T201


# --- seed -------------------------------------------------------------------------------------------------------


def _register_seed(actions: Any) -> None:
    parser = add_command(
        actions,
        "seed",
        summary="what makes each board of a fleet itself: id, broker, profile, and a token to enrol with",
        description=(
            "Make a seed for each device of an inventory, which is a fleet file, with the boards' serial numbers if\n"
            "you know them. A seed holds the device's id and its entry of the fleet file, the broker's address, and\n"
            "a token that counts once; its keys a board makes itself. The same command again makes what is missing,\n"
            "and leaves all else as it is. Seeds are secrets until they are used, and readable by you alone.\n\n"
            "forms:\n"
            "  image   ID.img, a FAT file system with the label FLEETSEED: write it to a partition or a USB stick\n"
            "  folder  ID/, the files themselves: copy them to such a file system\n"
            "  rootfs  SERIAL.rootfs/, to copy over Linux_for_Tegra/rootfs before that one board is flashed\n\n"
            "Needs an authority (`fleetune fleet init`), and mtools for images."
        ),
        examples=(
            "  fleetune flash seed --inventory fleet.yaml --pack minilm\n"
            "  fleetune flash seed --inventory fleet.yaml --pack minilm --device nano-7 --renew\n"
            "  fleetune flash seed --inventory fleet.yaml --pack minilm --json | jq -r '.[].path'\n"
        ),
    )
    parser.add_argument("--inventory", metavar="FILE", type=Path, required=True, help="fleet file, docs/fleet-file.md")
    parser.add_argument(
        "--pack", required=True, metavar="NAME", help="pack of the image, or the path of one on the boards (with a /)"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        default="/var/lib/fleetune/samples.jsonl",
        help="where boards keep their samples (default: %(default)s)",
    )
    parser.add_argument(
        "--device", dest="devices", action="append", metavar="ID", help="only this one; may be given several times"
    )
    parser.add_argument("--form", choices=("image", "folder", "rootfs"), default="image", help="(default: %(default)s)")
    parser.add_argument(
        "--hours", type=float, default=168.0, metavar="H", help="life of the tokens (default: %(default)s, a week)"
    )
    parser.add_argument("--renew", action="store_true", help="new tokens, also for devices that have used theirs")
    add_authority(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("seeds"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the seeds as JSON")
    parser.set_defaults(run=_seed)


def _seed(args: argparse.Namespace) -> None:
    from contextlib import closing
    from dataclasses import asdict

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.fleet import read_fleet
    from fleetune.server.authority.authority import Authority
    from fleetune.tools.flash.content import PACKS
    from fleetune.tools.flash.seed import Order, Seeded, make_seeds

    if not 0 < args.hours <= 24 * 365:
        raise ConfigError(f"--hours: {args.hours} is out of range", "choose from above 0 to 8760")
    pack = args.pack if "/" in args.pack else f"/{PACKS / args.pack}"
    for option, path in (("--pack", pack), ("--data", args.data)):
        if not path.startswith("/"):
            raise ConfigError(f"{option}: {path} is not absolute", "say where it is on the boards, from / on")
    fleet = read_fleet(args.inventory)
    devices = [fleet.device(name) for name in dict.fromkeys(args.devices)] if args.devices else list(fleet.devices)
    order = Order(fleet, pack, args.data, args.hours, args.form, args.renew)
    seeded: list[Seeded] = []

    def done(one: Seeded) -> None:
        seeded.append(one)
        if not args.json:
            print(f"{one.state:5} {one.device:24} {one.path}  until {utc(one.expires)}")  # noqa: T201

    with closing(Authority(args.authority)) as authority:
        make_seeds(order, devices, authority, args.out, done)
    if args.json:
        rows = [asdict(one) | {"path": str(one.path), "expires": utc(one.expires)} for one in seeded]
        print(json.dumps(rows, indent=1))  # noqa: T201


def _progress(words: str) -> None:
    print(words, file=sys.stderr)  # noqa: T201
