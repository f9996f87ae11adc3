"""``fleetune plan``."""

from __future__ import annotations

import argparse
import json
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
    which.add_argument("--profile", metavar="FILE", help="profile with what `fleetune profile` measured")
    which.add_argument("--fleet", metavar="FILE", type=Path, help="fleet file whose devices have such profiles")
    parser.add_argument("--id", metavar="ID", help="with --fleet: this device alone, in detail")
    samples = parser.add_mutually_exclusive_group(required=True)
    samples.add_argument("--data", metavar="FILE", type=Path, help="the device's data file")
    samples.add_argument("--samples", metavar="N", type=int, help="training samples; two fifths as many are evaluated")
    parser.add_argument(
        "--length", metavar="T", type=int, help="with --samples: tokens of each (default: the pack's longest)"
    )
    parser.add_argument("--classes", metavar="N", type=int, default=2, help="of the task (default: %(default)s)")
    parser.add_argument("--epochs", metavar="N", type=int, default=1, help="epochs a round (default: %(default)s)")
    parser.add_argument("--batch", metavar="N", type=int, default=16, help="samples a step (default: %(default)s)")
    parser.add_argument("--max-depth", metavar="N", type=int, help="deepest of the job (default: all blocks)")
    parser.add_argument("--threads", metavar="N", type=int, help="only from trials with so many threads")
    parser.add_argument("--deadline", metavar="S", type=float, help="the same as --what-if seconds=S")
    parser.add_argument(
        "--what-if",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a limit in place of the fleet file's: memory=1536MiB, cpu_seconds=20, seconds=60, disk=500MiB, joules=90",
    )
    parser.add_argument("--all", action="store_true", help="every plan, with what it lacks")
    parser.add_argument("--json", action="store_true", help="print JSON; --all adds every plan with what it lacks")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import math

    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.errors import BudgetError, ConfigError
    from fleetune.edge.resources.limits import Budget
    from fleetune.profiles.fleet import read_fleet
    from fleetune.profiles.profile import read_profile
    from fleetune.tools.plan.answer import Answer, answer, fleet_table, in_words
    from fleetune.tools.plan.question import budget, workload

    if args.id is not None and args.fleet is None:
        raise ConfigError(f"--id: {args.id}: a profile has no devices", "leave it out, or name a --fleet")
    if args.classes < 2:
        raise ConfigError(f"--classes: {args.classes} is out of range", "a task has at least 2 classes")
    pack = Pack.open(args.pack)
    asked = workload(args, pack)
    if args.fleet is None:
        devices = [(args.profile, read_profile(args.profile), Budget(math.inf))]
    else:
        fleet = read_fleet(args.fleet)
        chosen = fleet.devices if args.id is None else (fleet.device(args.id),)
        devices = [(device.id, device.profile, device.budget) for device in chosen]
    found = list[Answer | tuple[str, str]]()
    for name, profile, given in devices:
        limits = budget(given, args.what_if, args.deadline)
        try:
            found.append(answer(name, profile, pack, asked, limits, threads=args.threads, classes=args.classes))
        except ConfigError as error:
            if len(devices) == 1:
                raise
            found.append((name, str(error).removeprefix(f"{name}: ")))
    answers = [one for one in found if isinstance(one, Answer)]
    if args.json:
        documents = [
            one.as_json(every=args.all) if isinstance(one, Answer) else {"device": one[0], "refusal": one[1]}
            for one in found
        ]
        print(json.dumps(documents if args.fleet is not None and args.id is None else documents[0], indent=2))  # noqa: T201
    elif len(devices) == 1 or args.all:
        print("\n\n".join(in_words(one, every=args.all) for one in answers))  # noqa: T201
    else:
        print(fleet_table(found))  # noqa: T201
    refused = [one.refusal for one in answers if one.refusal is not None]
    if refused and len(devices) == 1:
        raise refused[0]
    return BudgetError.exit_code if refused else ConfigError.exit_code if len(answers) < len(found) else 0
