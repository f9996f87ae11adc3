"""``fleetune broker``."""

from __future__ import annotations

import argparse
import signal
from typing import Any

from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "broker",
        summary="run the embedded MQTT 5 broker",
        description=(
            "Run the embedded MQTT 5 broker (rumqttd) until Ctrl-C. It has no users and no encryption, so it listens\n"
            "on loopback only: it is for one machine. For a lab or a plant use Mosquitto or a cluster."
        ),
        examples="  fleetune broker\n  fleetune broker --port 1884\n",
    )
    parser.add_argument("--port", type=int, default=1883, help="port on 127.0.0.1 (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.server.broker import embedded_broker

    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port: {args.port} is out of range", "choose from 1 to 65535")
    with embedded_broker(args.port) as address:
        print(f"broker: {address}", flush=True)  # noqa: T201
        while True:
            signal.pause()
