"""``fleetune enroll``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import IDENTITY, add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "enroll",
        summary="bring this device into a fleet, with a token",
        description=(
            "Make this device's keys, here, and have the fleet's authority sign that they are this device's. The\n"
            "token comes from `fleetune fleet enroll`; it counts once. Afterwards the agent renews what it has by\n"
            "itself. Private keys stay in the folder, readable by its owner alone, or in a hardware token."
        ),
        examples=(
            "  fleetune enroll --token nano-1.token --state /var/lib/fleetune\n"
            "  echo fleetune1.eyJ… | fleetune enroll --token - --state /var/lib/fleetune\n"
            "  fleetune enroll --token nano-1.token --state /var/lib/fleetune \\\n"
            "                  --key 'pkcs11:token=lab;object=nano-1?module-path=/usr/lib/libckteec.so'\n"
        ),
    )
    parser.add_argument(
        "--token", metavar="FILE", required=True, help="file with the token, or - to read it from standard input"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--state", metavar="DIR", type=Path, help="the agent's state folder: the identity goes below it")
    where.add_argument("--identity", metavar="DIR", type=Path, help="folder of the identity itself")
    parser.add_argument(
        "--key", metavar="URI", help="sign with a key in a hardware token (PKCS#11, RFC 7512); made there if missing"
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=60.0,
        help="seconds in which the authority must answer (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.agent.enrolment import enrol
    from fleetune.edge.protocol.identity.enrolment import Token

    token = Token.parse(_read(args.token))
    folder = args.identity or args.state / IDENTITY
    identity = enrol(token, folder, key=args.key, timeout=args.timeout)
    print(f"{identity.credential.name} belongs to the fleet {identity.credential.fleet}; its identity is in {folder}")  # noqa: T201
    if args.token != "-":  # noqa: S105 - standard input
        Path(args.token).unlink()
        print(f"{args.token} was used, and is gone")  # noqa: T201


def _read(source: str) -> str:
    import sys

    from fleetune.edge.protocol.errors import EnrolmentError
    from fleetune.edge.protocol.identity.enrolment import MAX_TOKEN

    if source == "-":
        return sys.stdin.read(MAX_TOKEN + 1)
    try:
        with Path(source).open(encoding="utf-8", errors="replace") as file:
            return file.read(MAX_TOKEN + 1)
    except FileNotFoundError as error:
        raise EnrolmentError(
            f"{source} is not there", "a token that was used is deleted; `fleetune fleet enroll` makes another"
        ) from error
