"""``fleetune agent``."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import (
    add_broker,
    add_codec,
    add_command,
    add_fleet,
    add_identity,
    add_pack,
    add_state,
    add_threads,
    check_codec,
    check_identity,
    check_pack,
    check_state,
    check_threads,
)

if TYPE_CHECKING:
    from fleetune.edge.agent.privacy import PrivacyLimits


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "agent",
        summary="run a device's agent",
        description=(
            "Run the agent of one device until it is stopped: it measures what training costs here, plans within the\n"
            "device's budget, and answers the aggregator's rounds. It needs only the plain install: no torch."
        ),
        examples=(
            "  fleetune agent --fleet fleet.yaml --id nano-1 --pack packs/minilm --data samples.jsonl \\\n"
            "                 --broker mqtt://192.168.1.10 --state /var/lib/fleetune\n"
            "  fleetune agent … --unit | sudo tee /etc/systemd/system/fleetune-agent.service\n"
        ),
    )
    add_fleet(parser)
    parser.add_argument("--id", required=True, help="this device's id in the fleet file")
    add_pack(parser)
    parser.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="samples: .jsonl (text) or .safetensors (pictures)"
    )
    add_broker(parser)
    add_identity(parser)
    add_state(parser)
    add_threads(parser, "training")
    add_codec(parser, "updates")
    parser.add_argument(
        "--costs",
        metavar="FILE",
        type=Path,
        help="costs measured on this machine before (an agent's costs.json); by default those of the device's profile, "
        "and where they do not count, those that are measured at the first start",
    )
    parser.add_argument(
        "--sensors",
        metavar="DIR",
        type=Path,
        default=Path("/"),
        help="folder whose sys/class/thermal says how hot it is, to rehearse heat (default: the board's own, /)",
    )
    parser.add_argument(
        "--dp-min-noise",
        type=float,
        metavar="Z",
        help="take no job that adds less noise to an update than this, over its clip (default: any job)",
    )
    parser.add_argument(
        "--dp-max-updates",
        type=int,
        metavar="N",
        help="with --dp-min-noise: let this many updates leave the device, in all jobs together, and no more",
    )
    parser.add_argument(
        "--unit", action="store_true", help="print a systemd unit that runs this command, and do nothing else"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError

    check_threads(args.threads)
    # ONNX Runtime computes what takes time; threads of NumPy's own hold 2 MiB. Read once, when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from fleetune.edge.agent.unit import systemd_unit
    from fleetune.edge.protocol.identity.credential import Sender
    from fleetune.edge.resources.costs import read_costs
    from fleetune.profiles.fleet import read_fleet

    fleet = read_fleet(args.fleet)
    try:
        device = fleet.device(args.id)
    except ConfigError as error:
        raise ConfigError(f"--id: {args.fleet}: {error.what}", error.remedy) from error
    check_state(args.state)
    if not (args.sensors / "sys").is_dir():
        raise ConfigError(
            f"--sensors: {args.sensors} has no folder sys", "name the folder that holds sys/class/thermal"
        )
    costs = tuple(measured.costs for measured in device.profile.measured)
    if args.costs is not None:
        try:
            costs = (read_costs(args.costs), *costs)
        except ConfigError as error:
            raise ConfigError(f"--costs: {error.what}", "leave the option out to measure again") from error
    check_codec(args.codec)
    privacy = _privacy_limits(args)
    broker, identity = check_identity(args, Sender("device", device.id), fleet.name)
    if args.unit:
        print(systemd_unit(device.id, _command(args), args.state.resolve()), end="")  # noqa: T201
        return

    from fleetune.edge.agent.agent import Agent  # with NumPy and all that trains, which a unit needs not
    from fleetune.edge.agent.config import AgentConfig
    from fleetune.edge.agent.rounds import Rounds, RoundsConfig

    check_pack(args, identity)
    config = AgentConfig(
        device=device.id,
        fleet=fleet.name,
        broker=broker,
        identity=identity,
        state=args.state,
        codec=args.codec,
        privacy=privacy,
    )
    rounds = RoundsConfig(
        pack=args.pack,
        data=args.data,
        budget=device.budget,
        threads=args.threads,
        costs=costs,
        sensors=args.sensors,
        throttles_c=device.profile.thermal.throttles_c if device.profile.thermal else None,
    )

    Agent(config, Rounds(rounds, device.id)).run()


def _privacy_limits(args: argparse.Namespace) -> PrivacyLimits:
    """What the device's owner asks of a job.

    Raises:
        ConfigError: An option is out of range, or says nothing without the other.
    """
    from fleetune.edge.agent.privacy import PrivacyLimits
    from fleetune.edge.protocol.errors import ConfigError

    least, most = args.dp_min_noise, args.dp_max_updates
    if least is not None and not 0 < least < math.inf:
        raise ConfigError(f"--dp-min-noise: {least} is out of range", "use a finite number above zero")
    if most is not None and most < 0:
        raise ConfigError(f"--dp-max-updates: {most} is out of range", "use 0 or more")
    if most is not None and least is None:
        raise ConfigError(
            "--dp-max-updates: updates without noise are not counted", "say with --dp-min-noise how much they need"
        )
    return PrivacyLimits(least, most)


def _command(args: argparse.Namespace) -> list[str]:
    """The same command again, wherever it is started from."""
    program = shutil.which("fleetune")
    words = [program] if program else [sys.executable, "-m", "fleetune.tools.cli"]
    words += ["agent", "--id", args.id, "--broker", args.broker]
    for name in ("fleet", "pack", "data", "state", "costs", "identity"):
        if (path := getattr(args, name)) is not None:
            words += [f"--{name}", str(path.resolve())]
    words += ["--insecure"] if args.insecure else []
    words += ["--sensors", str(args.sensors.resolve())] if args.sensors != Path("/") else []
    for name in ("dp_min_noise", "dp_max_updates"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, "--threads", str(args.threads), "--codec", args.codec]
