"""``fleetune experiment``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command

_QUICK = {"rounds": 3, "limit": 100}


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "experiment",
        summary="hold a method against others on one machine",
        description=(
            "Hold pFedMoE against other methods, as its paper does: clients with different CNNs, on pictures that are\n"
            "dealt out unevenly, in this process, without a broker. Every method has the same samples, the same\n"
            "clients in every round, and as many steps. Prints a table for each split, and leaves it in DIR with a\n"
            "picture and all runs; each is kept as soon as it is done, so the same command goes on where it was\n"
            "stopped. Needs the `all` extra."
        ),
        examples=(
            "  fleetune experiment pfedmoe --quick\n"
            "  fleetune experiment pfedmoe --out runs/fashion                    an hour or more\n"
            "  fleetune experiment pfedmoe --data emoji-8 --split natural --out runs/emoji\n"
            "  fleetune experiment pfedmoe --data data/cifar-10-batches-py --clients 50 --fraction 0.2 --rounds 200\n"
            "  fleetune experiment pfedmoe --model cnn-1 --methods pfedmoe,standalone,fedavg,fedper,ditto\n"
            "  fleetune experiment pfedmoe --methods pfedmoe,pfedmoe-fixed,pfedmoe-element,pfedmoe-held-out\n"
        ),
    )
    parser.add_argument("name", metavar="NAME", choices=("pfedmoe",), help="pfedmoe")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/experiment"),
        help="keeps runs, table.md, accuracy.png and results.json (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        default="fashion-mnist",
        help="fashion-mnist, emoji-8, or a folder with CIFAR-10 or CIFAR-100 for Python (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        metavar="LIST",
        help="pathological: two classes a client; dirichlet; natural: a client for each vendor (default: pathological,"
        "dirichlet, and for emoji-8 natural)",
    )
    parser.add_argument("--alpha", type=float, default=0.3, metavar="X", help="of dirichlet (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=10, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, metavar="X", help="of them that play in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", metavar="LIST", help="one run for each (default: %(default)s)")
    parser.add_argument(
        "--methods",
        metavar="LIST",
        help="pfedmoe, standalone, lg-fedavg, fml, fedkd, fedproto, fedgh, fd, and with one model for all fedavg, "
        "fedper, ditto (default: all of these that the models allow); and with another gate pfedmoe-fixed: one half "
        "each, pfedmoe-element: a weight for each element, pfedmoe-held-out: learns from a fifth of the samples, alone",
    )
    parser.add_argument(
        "--model",
        choices=("mixed", "cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5"),
        default="mixed",
        help="private model of all clients; mixed: CNN-1 to CNN-5 in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=500, metavar="N", help="samples a client, 0 for all (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="a round (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="samples a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.1, metavar="X", help="of SGD (default: %(default)s)")
    parser.add_argument(
        "--shared-learning-rate", type=float, metavar="X", help="of what pFedMoE shares (default: the same)"
    )
    parser.add_argument(
        "--gate-learning-rate",
        type=float,
        default=0.01,
        metavar="X",
        help="of what weighs its parts (default: %(default)s)",
    )
    parser.add_argument(
        "--target", type=float, metavar="X", help="accuracy that costs are counted to (default: stand-alone's best)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 samples a client, 3 rounds, one seed: shows that it works"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of a step, 0 for one a core; with 1, as many commands as cores get more done together, each with seeds "
        "or splits of its own in one DIR (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.tools.require import require_all_extras

    require_all_extras()

    from rich.table import Table

    from fleetune.edge.protocol.files import write_atomic
    from fleetune.tools.experiment.report import document, draw, grid, rows
    from fleetune.tools.experiment.run import ABLATIONS, EQUAL, METHODS, Setting, cases, check, play_all
    from fleetune.tools.terminal import open_console, show_steps

    seeds = _check(args)
    if args.quick:
        for name, value in _QUICK.items():
            setattr(args, name, value)
        seeds = seeds[:1]
    splits = (args.split or ("natural" if args.data == "emoji-8" else "pathological,dirichlet")).split(",")
    setting = Setting(
        args.data,
        args.clients,
        args.fraction,
        args.rounds,
        args.model,
        args.limit or None,
        args.alpha,
        args.epochs,
        args.batch,
        args.learning_rate,
        args.shared_learning_rate,
        args.gate_learning_rate,
    )
    mixed = args.model == "mixed"
    usual = [name for name in METHODS if name not in ABLATIONS and not (mixed and name in EQUAL)]
    methods = args.methods.split(",") if args.methods else usual
    check(setting, methods)
    console = open_console(stderr=True)
    with show_steps(console) as say:
        records = play_all(setting, cases(splits, seeds, methods), args.out / "runs", say, threads=args.threads)
    found = rows(records, args.target)
    grids = [grid(split, [row for row in found if row.split == split]) for split in splits]
    results = json.dumps(document(setting, records, found), indent=1)
    write_atomic(args.out / "results.json", results.encode())
    write_atomic(args.out / "table.md", "\n\n".join(one.as_markdown() for one in grids).encode() + b"\n")
    draw(args.out / "accuracy.png", f"{args.data}, {args.rounds} rounds, {len(seeds)} seeds", records)
    if args.json:
        print(results)  # noqa: T201
        return
    for one in grids:
        table = Table(title=one.title, title_justify="left")
        for place, name in enumerate(one.head):
            table.add_column(name, justify="right" if place else "left", no_wrap=not place)
        for row in one.rows:
            table.add_row(*row)
        open_console(stderr=False).print(table)
    console.print(f"{args.out / 'table.md'}, {args.out / 'accuracy.png'}, {args.out / 'results.json'}", soft_wrap=True)


def _check(args: argparse.Namespace) -> list[int]:
    """The seeds, once all options are seen to be in range."""
    from fleetune.edge.protocol.errors import ConfigError

    rates = {
        "--learning-rate": args.learning_rate,
        "--shared-learning-rate": args.shared_learning_rate,
        "--gate-learning-rate": args.gate_learning_rate,
    }
    for option, value, fits in (
        ("--clients", args.clients, args.clients >= 2),
        ("--fraction", args.fraction, 0 < args.fraction <= 1),
        ("--rounds", args.rounds, args.rounds >= 1),
        ("--limit", args.limit, args.limit >= 0),
        ("--epochs", args.epochs, args.epochs >= 1),
        ("--batch", args.batch, args.batch >= 2),
        ("--threads", args.threads, args.threads >= 0),
        ("--alpha", args.alpha, 0 < args.alpha < 1e6),
        *((option, rate, rate is None or 0 < rate < 1e3) for option, rate in rates.items()),
    ):
        if not fits:
            raise ConfigError(f"{option}: {value} is out of range", "see `fleetune experiment --help`")
    words = args.seeds.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ConfigError(f"--seeds: {args.seeds} is no list of different whole numbers", "write 0,1,2")
    return [int(word) for word in words]
