"""``fleetune plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command, add_pack


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "plan",
        summary="say what a device would train, without the device",
        description=(
            "Plan a round from a measured profile (`fleetune profile`) and a pack: how many blocks, in which\n"
            "micro-batches, with which cache, and what that takes: memory, seconds, CPU seconds, bytes over the air.\n"
            "Says what stands in the way of every deeper plan. Needs only the plain install."
        ),
        examples=(
            "  fleetune plan --profile cam.yaml --pack packs/minilm --data samples.jsonl --what-if memory=160MiB\n"
            "  fleetune plan --profile cam.yaml --pack packs/minilm --samples 200 --length 30 --deadline 60\n"
            "  fleetune plan --fleet fleet.yaml --pack packs/minilm --samples 200 --length 30    one table for all\n"
        ),
    )
    add_pack(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--profile", metavar="FILE", help="a profile with what `fleetune profile` measured")
    which.add_argument("--fleet", metavar="FILE", type=Path, help="a fleet file whose devices have such profiles")
    samples = parser.add_mutually_exclusive_group(required=True)
    samples.add_argument("--data", metavar="FILE", type=Path, help="the device's data file")
    samples.add_argument("--samples", metavar="N", type=int, help="training samples; as many are evaluated as a fifth")
    parser.add_argument(
        "--length", metavar="T", type=int, help="tokens of a sample, with --samples (default: the pack's longest)"
    )
    parser.add_argument("--epochs", metavar="N", type=int, default=1, help="epochs a round (default: %(default)s)")
    parser.add_argument("--batch", metavar="N", type=int, default=16, help="samples a step (default: %(default)s)")
    parser.add_argument("--max-depth", metavar="N", type=int, help="deepest of the job (default: all blocks)")
    parser.add_argument("--threads", metavar="N", type=int, help="only what was measured with so many threads")
    parser.add_argument("--deadline", metavar="S", type=float, help="the same as --what-if deadline=S")
    parser.add_argument(
        "--what-if",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a limit in place of the fleet file's: memory=1536MiB, cpu_seconds=20, deadline=60, disk=500MiB, joules=90",
    )
    parser.add_argument("--all", action="store_true", help="list every plan, with what it lacks")
    parser.add_argument("--json", action="store_true", help="print JSON: the plan, and every other with what it lacks")
    parser.set_defaults(run=_run)
