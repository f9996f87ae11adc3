"""``fleetune agent``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import (
    add_broker,
    add_command,
    add_fleet,
    add_pack,
    add_state,
    add_threads,
    check_state,
    check_threads,
)


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
        ),
    )
    add_fleet(parser)
    parser.add_argument("--id", required=True, help="this device's id in the fleet file")
    add_pack(parser)
    parser.add_argument(
        "--data", metavar="FILE", type=Path, required=True, help="samples: .jsonl (text) or .safetensors (pictures)"
    )
    add_broker(parser)
    add_state(parser)
    add_threads(parser, "training")
    parser.add_argument(
        "--codec", choices=("f32", "f16"), default="f16", help="number format of updates (default: %(default)s)"
    )
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
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError

    check_threads(args.threads)
    # ONNX Runtime computes what takes time; threads of NumPy's own hold 2 MiB. Read once, when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    import msgspec

    from fleetune.edge.agent.agent import Agent
    from fleetune.edge.agent.config import AgentConfig
    from fleetune.edge.protocol.link import BrokerAddress
    from fleetune.edge.resources.costs import Costs
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
            costs = (msgspec.json.decode(args.costs.read_bytes(), type=Costs), *costs)
        except (OSError, *UNDECODABLE) as error:
            raise ConfigError(f"--costs: {args.costs}: {error}", "leave the option out to measure again") from error
    config = AgentConfig(
        device=device.id,
        fleet=fleet.name,
        broker=BrokerAddress.parse(args.broker),
        pack=args.pack,
        data=args.data,
        state=args.state,
        budget=device.budget,
        threads=args.threads,
        codec=args.codec,
        costs=costs,
        sensors=args.sensors,
        throttles_c=device.profile.thermal.throttles_c if device.profile.thermal else None,
    )
    Agent(config).run()
