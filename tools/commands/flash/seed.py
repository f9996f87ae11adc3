"""``fleetune flash seed``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_authority, add_command, add_inventory
from fleetune.tools.text import say, utc


def register(actions: Any) -> None:
    """Add the action."""
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
    add_inventory(parser)
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
    parser.add_argument(
        "--releases",
        metavar="DIR",
        type=Path,
        help="what `fleetune release init` made, so that boards look for releases",
    )
    add_authority(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("seeds"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the seeds as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from contextlib import closing
    from dataclasses import asdict

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.fleet import read_fleet
    from fleetune.server.authority.authority import Authority
    from fleetune.tools.flash.seed import Order, Seeded, make_seeds
    from fleetune.tools.places import UPDATES

    if not 0 < args.hours <= 24 * 365:
        raise ConfigError(f"--hours: {args.hours} is out of range", "choose from above 0 to 8760")
    pack = args.pack if "/" in args.pack else f"/{UPDATES}/packs/{args.pack}"
    for option, path in (("--pack", pack), ("--data", args.data)):
        if not path.startswith("/"):
            raise ConfigError(f"{option}: {path} is not absolute", "say where it is on the boards, from / on")
    fleet = read_fleet(args.inventory)
    devices = [fleet.device(name) for name in dict.fromkeys(args.devices)] if args.devices else list(fleet.devices)
    releases = None
    if args.releases is not None:
        from fleetune.tools.release.repository import Releases

        with Releases(args.releases) as held:
            releases = held.url, held.root_file
    order = Order(fleet, pack, args.data, args.hours, args.form, releases, args.renew)
    seeded: list[Seeded] = []

    def done(one: Seeded) -> None:
        seeded.append(one)
        if one.ended:
            say(f"{one.device}: the token of another seed counts no more; a board has to be given this one")
        if not args.json:
            print(f"{one.state:5} {one.device:24} {one.path}  until {utc(one.expires)}")  # noqa: T201

    with closing(Authority(args.authority)) as authority:
        make_seeds(order, devices, authority, args.out, done)
    if args.json:
        rows = [asdict(one) | {"path": str(one.path), "expires": utc(one.expires)} for one in seeded]
        print(json.dumps(rows, indent=1))  # noqa: T201
