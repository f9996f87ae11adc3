"""``fleetune serve``."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fleetune.tools.commands.options import (
    add_broker,
    add_codec,
    add_command,
    add_fleet,
    add_identity,
    add_pack,
    add_state,
    check_codec,
    check_identity,
    check_pack,
    check_state,
)
from fleetune.tools.privacy import add_privacy_options


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "serve",
        summary="run the aggregator",
        description=(
            "Run the aggregator until its jobs are done. Every update is journaled before it is acknowledged; start\n"
            "the same command again after a crash and it goes on in the middle of the round."
        ),
        examples=(
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator\n"
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator \\\n"
            "                 --job standalone --job fedms --global-rounds 10 --personal-rounds 5\n"
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator \\\n"
            "                 --quorum 8 --deadline 900      after 15 minutes, 8 updates close a round\n"
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator \\\n"
            "                 --rule trimmed-mean --assume-malicious 0.3      devices may lie\n"
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator \\\n"
            "                 --dp-epsilon 4                 little can be learned of any one device\n"
            "  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator \\\n"
            "                 --broker mqtts://broker --identity authority/members/aggregator      a fleet with keys\n"
        ),
    )
    add_fleet(parser)
    add_pack(parser)
    add_broker(parser)
    add_identity(parser)
    add_state(parser)
    add_job_options(parser)
    add_privacy_options(parser)
    parser.add_argument("--classes", type=int, required=True, metavar="N", help="classes of the task")
    parser.add_argument(
        "--quorum",
        type=int,
        metavar="N",
        help="updates that close a round at its deadline, devices that begin without the rest (default: all devices)",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which a quorum begins, or closes a round (default: %(default)s)",
    )
    add_codec(parser, "broadcasts")
    parser.add_argument(
        "--buffer",
        type=int,
        metavar="K",
        help="asynchronous rounds: each closes after K updates, whoever still trains; what comes later counts in the "
        "next ones (default: rounds wait for the devices)",
    )
    parser.add_argument(
        "--max-staleness",
        type=int,
        default=8,
        metavar="N",
        help="closed rounds after which an update that comes late no longer counts (default: %(default)s)",
    )
    parser.add_argument(
        "--quarantine-after",
        type=int,
        default=3,
        metavar="N",
        help="updates of a device that are refused for cause, such as values that are not finite, after which the run "
        "goes on without it (default: %(default)s)",
    )
    parser.add_argument(
        "--readmit", action="append", default=[], metavar="DEVICE", help="let a device out of quarantine; repeatable"
    )
    parser.add_argument(
        "--keep-history", action="store_true", help="keep every round's updates and global tensors, to study the run"
    )
    parser.set_defaults(run=_run)


def add_job_options(parser: argparse.ArgumentParser, *, jobs: str = "fedms", max_depth: int | None = None) -> None:
    """What is trained, and how; `fleetune demo` has the same options, and other jobs and depths to begin with.

    Args:
        parser: Gets the options.
        jobs: What is trained if nothing is named, for the help.
        max_depth: Default of ``--max-depth``; None is all blocks.
    """
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--job",
        dest="jobs",
        action="append",
        choices=("fedms", "pfedmoe", "standalone", "frozen-head"),
        metavar="METHOD",
        help="fedms: one backbone for all devices; pfedmoe: a backbone for each kind of board, and a small extractor "
        f"that all share; standalone and frozen-head: nothing is shared; may be given several times (default: {jobs})",
    )
    group.add_argument("--global-rounds", type=int, default=6, metavar="N", help="FedMS stage 1 (default: %(default)s)")
    group.add_argument(
        "--personal-rounds", type=int, default=3, metavar="N", help="FedMS stage 2 (default: %(default)s)"
    )
    group.add_argument("--epochs", type=int, default=1, metavar="N", help="local epochs a round (default: %(default)s)")
    group.add_argument("--batch", type=int, default=16, metavar="N", help="samples a step (default: %(default)s)")
    group.add_argument(
        "--optimiser",
        choices=("adam", "sgd"),
        default="adam",
        help="sgd, with momentum, has half of Adam's state and wants a larger learning rate (default: %(default)s)",
    )
    group.add_argument(
        "--learning-rate", type=float, default=2e-3, metavar="X", help="step size (default: %(default)s)"
    )
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="of Adam (default: %(default)s)")
    group.add_argument(
        "--max-depth",
        type=int,
        default=max_depth,
        metavar="N",
        help="deepest that any device may train; where it is less, devices that train fewer blocks cache more of the "
        f"others, and need less CPU (default: {max_depth or 'all blocks'})",
    )
    group.add_argument("--sal-start", type=int, default=2, metavar="N", help="SAL: first depth (default: %(default)s)")
    group.add_argument("--sal-step", type=int, default=1, metavar="N", help="SAL: blocks added (default: %(default)s)")
    group.add_argument(
        "--sal-window", type=int, default=2, metavar="N", help="SAL: results in the queue (default: %(default)s)"
    )
    group.add_argument(
        "--sal-threshold",
        type=float,
        default=0.05,
        metavar="X",
        help="SAL: gain below which it deepens (default: %(default)s)",
    )
    group.add_argument(
        "--gate-rank", type=int, default=8, metavar="N", help="of the gate adapter (default: %(default)s)"
    )
    group.add_argument(
        "--gate-learning-rate", type=float, metavar="X", help="of the gate (default: 1e-4, with pfedmoe 1e-3)"
    )
    group.add_argument(
        "--shared-learning-rate",
        type=float,
        default=1e-3,
        metavar="X",
        help="pfedmoe: of the extractor that all share (default: %(default)s)",
    )
    group.add_argument(
        "--gate",
        choices=("sample", "element", "fixed"),
        default="sample",
        help="pfedmoe: what weighs the shared and the private model: a network for each sample, a weight for each "
        "element of the representation, or one half each (default: %(default)s)",
    )
    group.add_argument(
        "--gate-split", choices=("train", "val"), default="train", help="samples of the gate (default: %(default)s)"
    )
    group.add_argument(
        "--mix", choices=("logits", "features"), default="logits", help="where experts are mixed (default: %(default)s)"
    )
    group.add_argument(
        "--rule",
        default="mean",  # server.job.RuleSettings, without NumPy
        metavar="NAME",
        help="how the updates of a round become one: mean clips each and weighs it by its samples, and bounds what one "
        "device does; median and trimmed-mean outvote just under half of the devices, multi-krum leaves out those that "
        "are unlike the others, and these three count no samples; docs/rules.md says what each withstands (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--assume-malicious",
        type=float,
        metavar="X",
        help="share of the devices that trimmed-mean and multi-krum are to withstand, below 0.5; the more, the more of "
        "what honest devices send is left out too (default: 0.2)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: %(default)s)")


def _run(args: argparse.Namespace) -> None:
    import sqlite3

    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.errors import ConfigError, RunFolderError
    from fleetune.profiles.fleet import read_fleet
    from fleetune.server.aggregator import Aggregator, AggregatorConfig
    from fleetune.server.leadership import OWN
    from fleetune.server.privacy import SUMS
    from fleetune.server.store import FILE
    from fleetune.tools.jobs import build_jobs, build_models, check_options, check_rule
    from fleetune.tools.privacy import read_privacy

    fleet = read_fleet(args.fleet)
    quorum = args.quorum if args.quorum is not None else len(fleet.devices)
    if not 1 <= quorum <= len(fleet.devices):
        raise ConfigError(f"--quorum: {quorum} is out of range", f"choose from 1 to {len(fleet.devices)}")
    if not 0 < args.deadline < math.inf:
        raise ConfigError(f"--deadline: {args.deadline} is out of range", "use a finite number above zero")
    if args.buffer is not None and not 1 <= args.buffer <= len(fleet.devices):
        raise ConfigError(f"--buffer: {args.buffer} is out of range", f"choose from 1 to {len(fleet.devices)}")
    if args.max_staleness < 0:
        raise ConfigError(f"--max-staleness: {args.max_staleness} is out of range", "use 0 or more")
    if args.quarantine_after < 1:
        raise ConfigError(f"--quarantine-after: {args.quarantine_after} is out of range", "use 1 or more")
    for device in args.readmit:
        try:
            fleet.device(device)
        except ConfigError as error:
            raise ConfigError(f"--readmit: {error.what}", error.remedy) from error
    check_codec(args.codec)
    check_state(args.state)
    broker, identity = check_identity(args, OWN, fleet.name)
    check_pack(args, identity)
    pack = Pack.open(args.pack)
    check_options(args)
    rounds = {"global": args.global_rounds, "personal": args.personal_rounds}
    updates = min(quorum, args.buffer or quorum)
    privacy = read_privacy(args, rounds, updates if args.rule in SUMS else 1)
    jobs = build_jobs(args, pack.manifest, classes=args.classes, codec=args.codec, privacy=privacy)
    check_rule(jobs[0].rule, updates=updates)
    config = AggregatorConfig(
        fleet=fleet.name,
        broker=broker,
        identity=identity,
        state=args.state,
        jobs=jobs,
        devices=frozenset(device.id for device in fleet.devices),
        quorum=quorum,
        deadline_s=args.deadline,
        buffer=args.buffer,
        max_staleness=args.max_staleness,
        quarantine_after=args.quarantine_after,
        readmit=frozenset(args.readmit),
        keep_history=args.keep_history,
        models=build_models(args, jobs, pack),
    )
    try:
        Aggregator(config).run()
    except sqlite3.DatabaseError as error:  # in a part of the file that a start does not look at
        raise RunFolderError(
            f"{args.state / FILE}: {error}", "delete the file and start again: it is made anew from the journal"
        ) from error
