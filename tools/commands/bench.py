"""``fleetune bench``."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "bench",
        summary="measure Fleetune beside its peers",
        description=(
            "Measure Fleetune beside its peers on this machine, in turns, in one run, several times; prints medians,\n"
            "ranges and ratios. `step` trains adapters, `infer` answers one sample at a time, both beside PEFT on\n"
            "torch; `mixture` trains pFedMoE's two CNNs and their gate beside torch; `plan` holds predicted memory\n"
            "and time against measured ones, and trains under hard limits. `round` is a round in which nobody trains,\n"
            "beside Flower; `fleet` hundreds of agents and thousands of updates on one aggregator; `bytes` what each\n"
            "codec puts on the link, and at which accuracy; `chaos` kills, cuts off, fills up and garbles small\n"
            "fleets, and looks at what is left on disk (as root); `attacks` has malicious devices lie to every rule,\n"
            "and says what each costs where nobody lies; `privacy` what noise costs in accuracy, by ε and by the\n"
            "number of devices.\n"
            "Peers are installed into an environment of their own in the cache (1.3 GB), never into Fleetune's.\n"
            "Needs the `all` extra."
        ),
        examples=(
            "  fleetune bench step --quick\n"
            "  fleetune bench step --json step.json\n"
            "  fleetune bench infer --json infer.json\n"
            "  fleetune bench plan --json plan.json          half an hour\n"
            "  fleetune bench round --peers streams          Flower's quick interface alone\n"
            "  fleetune bench bytes --json bytes.json        half an hour\n"
            "  sudo fleetune bench chaos --quick             a dozen runs; all 300 take 40 minutes\n"
            "  fleetune bench attacks --json attacks.json    an hour and a half; leaves a picture too\n"
            "  fleetune bench step --quick --peers none      Fleetune alone, nothing to install\n"
        ),
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        choices=("step", "mixture", "infer", "plan", "round", "fleet", "bytes", "chaos", "attacks", "privacy"),
        help="step: a training step; mixture: one of pFedMoE; infer: an answer; plan: predictions, and rounds under "
        "hard limits; round, fleet, bytes: what travels; chaos: faults; attacks: devices that lie; privacy: accuracy "
        "under noise",
    )
    parser.add_argument("--quick", action="store_true", help="fewer models, samples and repeats: under two minutes")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--peers",
        metavar="LIST",
        help="all: PEFT in fp32 on all blocks; same: on the same blocks; nf4: in 4 bits; deployed, streams: two ways "
        "to run Flower; torch; none (default: all that a benchmark has; infer has only `same`)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="threads of every contender (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import shutil

    from fleetune.tools.require import require_all_extras

    require_all_extras()

    from rich.table import Table

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.edge.protocol.files import FolderLock, write_atomic
    from fleetune.tools.assets import cache_root
    from fleetune.tools.bench.chaos import chaos
    from fleetune.tools.bench.learning import attacks, privacy
    from fleetune.tools.bench.learning import bytes as bytes_
    from fleetune.tools.bench.training import infer, mixture, plan, step
    from fleetune.tools.bench.transfer import fleet, rounds
    from fleetune.tools.terminal import open_console, show_steps

    run, known = {
        "step": (step.bench_step, step.PEERS),
        "mixture": (mixture.bench_mixture, mixture.PEERS),
        "infer": (infer.bench_infer, infer.PEERS),
        "plan": (plan.bench_plan, plan.PEERS),
        "round": (rounds.bench_round, rounds.PEERS),
        "fleet": (fleet.bench_fleet, fleet.PEERS),
        "bytes": (bytes_.bench_bytes, bytes_.PEERS),
        "chaos": (chaos.bench_chaos, chaos.PEERS),
        "attacks": (attacks.bench_attacks, attacks.PEERS),
        "privacy": (privacy.bench_privacy, privacy.PEERS),
    }[args.name]
    peers = list(known) if args.peers is None else [] if args.peers == "none" else args.peers.split(",")
    if unknown := [peer for peer in peers if peer not in known]:
        raise ConfigError(f"--peers: {', '.join(unknown)} is unknown", f"choose from {', '.join(known)}, or none")
    if args.threads < 1:
        raise ConfigError(f"--threads: {args.threads} is out of range", "use 1 or more")
    console = open_console(stderr=True)
    folder = cache_root() / "bench"
    with closing(FolderLock(folder, remedy="wait until it ends: two runs at once would measure each other")):
        work = folder / args.name
        shutil.rmtree(work, ignore_errors=True)  # what is left of the run before, its logs among it
        with show_steps(console) as say:
            document = run(work, quick=args.quick, peers=peers, threads=args.threads, say=say)
    table = Table("figure", "median", "range", "peer", "its median", "ratio", "target", "")
    for item in document.figures:
        table.add_row(
            item.name,
            f"{item.value:.3g} {item.unit}",
            f"{item.spread[0]:.3g} to {item.spread[1]:.3g}",
            item.peer or "",
            "" if item.peer_value is None else f"{item.peer_value:.3g}",
            "" if item.ratio is None else f"{item.ratio:.3g}",
            item.target or "",
            {None: "", True: "met", False: "missed"}[item.met],
        )
    tables = [Table(*grid.head, title=grid.title, title_justify="left") for grid in document.grids]
    for shown, grid in zip(tables, document.grids, strict=True):
        for row in grid.rows:
            shown.add_row(*row)
    open_console(stderr=False).print(*(tables or [table]), sep="\n")
    for note in document.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if args.json is not None:
        write_atomic(args.json, json.dumps(document.as_json(), indent=1).encode())
