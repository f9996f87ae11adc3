"""``fleetune hil env`` and ``fleetune hil rig``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command, add_inventory
from fleetune.tools.text import say


def register(actions: Any) -> None:
    """Add the actions."""
    env = add_command(
        actions,
        "env",
        summary="write a labgrid environment for each board of a fleet",
        description=(
            "Write a labgrid environment for each board of a fleet file: by templates for Jetson Nano, Jetson Orin\n"
            "and Raspberry Pi, by one of yours for others. A file that is there stays as it is, so that what you have\n"
            "changed is kept. docs/hil.md says how a board of a lab is added."
        ),
        examples=(
            "  fleetune hil env --inventory fleet.yaml\n"
            "  fleetune hil env --inventory fleet.yaml --place 'rack-1-{id}' --power PDUDaemonDriver\n"
        ),
    )
    add_inventory(env)
    env.add_argument("--out", metavar="DIR", type=Path, default=Path("hil"), help="(default: %(default)s)")
    env.add_argument(
        "--place", default="{id}", metavar="NAME", help="labgrid's place of a board (default: %(default)s, its id)"
    )
    env.add_argument(
        "--power",
        default="NetworkPowerDriver",
        metavar="DRIVER",
        help="labgrid's driver for the power of a board (default: %(default)s)",
    )
    env.add_argument("--template", metavar="FILE", type=Path, help="of every environment (default: by kind of board)")
    env.set_defaults(run=_env)
    rig = add_command(
        actions,
        "rig",
        summary="make the fleet's own side of a lab: for each board an authority, a broker, releases, and its seed",
        description=(
            "Make rigs: the fleet's own side of a lab, one for each board, so that no test disturbs another board.\n"
            "A rig has an authority, the broker's configuration, a repository of releases, the pack signed, samples,\n"
            "and the board's seed. `fleetune hil run` then runs broker, authority and aggregator by itself."
        ),
        examples=(
            "  fleetune hil rig --inventory fleet.yaml --pack packs/minilm --data reviews.jsonl --host 192.168.1.10\n"
            "  fleetune flash build --tier t1 --pack packs/minilm\n"
        ),
    )
    add_inventory(rig)
    rig.add_argument("--pack", required=True, metavar="DIR", type=Path, help="what the boards train")
    rig.add_argument("--data", required=True, metavar="FILE", type=Path, help="what they train on, of two classes")
    rig.add_argument("--host", required=True, metavar="ADDRESS", help="how the boards reach this machine")
    rig.add_argument(
        "--ports",
        metavar="FROM",
        type=int,
        help="ports of rigs that are new, three for each, from this one up (default: free ones)",
    )
    rig.add_argument("--out", metavar="DIR", type=Path, default=Path("rigs"), help="(default: %(default)s)")
    rig.set_defaults(run=_rig)


def _env(args: argparse.Namespace) -> None:
    from fleetune.profiles.fleet import read_fleet
    from fleetune.tools.require import require_hil_extra

    require_hil_extra()
    from fleetune.tools.hil.environment import write_environments

    made = write_environments(
        read_fleet(args.inventory), args.out, place=args.place, power=args.power, template=args.template
    )
    for state, names in made.items():
        for name in names:
            print(f"{state:4} {args.out / name}")  # noqa: T201
    if made["kept"]:
        say("what was kept is as it was, whatever the options say now: remove a file to have it written anew")


def _rig(args: argparse.Namespace) -> None:
    from fleetune.profiles.fleet import Fleet, read_fleet
    from fleetune.tools.rig import check_rig, make_rig, make_rig_seeds

    fleet = read_fleet(args.inventory)
    devices = {args.out / device.id: device for device in fleet.devices}
    there = [folder for folder in devices if folder.exists()]
    for folder in there:
        check_rig(folder, args.pack, args.data, args.host)
    ports = _ports(args.ports, there, len(devices) - len(there))
    for folder, device in devices.items():
        if folder not in there:
            try:
                make_rig(folder, Fleet(fleet.name, (device,)), args.pack, args.data, args.host, ports.pop(0))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        (seed,) = make_rig_seeds(folder)
        print(f"{seed.state:4} {device.id:24} {seed.path}")  # noqa: T201


def _ports(first: int | None, there: list[Path], rigs: int) -> list[list[int] | None]:
    """Three of each new rig, beside those of rigs that are there; None where any will do."""
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.rig import rig_ports

    if first is None:
        return [None] * rigs
    taken = {port for folder in there for port in rig_ports(folder)}
    free = [port for port in range(max(first, 1), 65536) if port not in taken]
    if first < 1 or len(free) < 3 * rigs:
        raise ConfigError(f"--ports: {3 * rigs} ports are not to be had from {first} up", "choose from 1 to 65533")
    return [free[3 * rig : 3 * rig + 3] for rig in range(rigs)]
