"""``fleetune demo``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command
from fleetune.tools.commands.serve import add_job_options


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "demo",
        summary="run a whole fleet on this machine",
        description=(
            "Run a whole fleet on this machine: the embedded MQTT 5 broker, the aggregator and four device agents,\n"
            "each a process of its own, with the budgets of four different boards. They train FedMS, or pFedMoE\n"
            "with two backbones in one fleet, on real data; the baselines run on the same splits. Leaves report.json\n"
            "and report.html. Ctrl-C stops all processes; the same command goes on where it stopped. Needs the `all`\n"
            "extra."
        ),
        examples=(
            "  fleetune demo\n"
            "  fleetune demo --out runs/images --task images\n"
            "  fleetune demo --out runs/mixed --method pfedmoe      two backbones in one fleet\n"
            "  fleetune demo --out runs/mine --backbone models/my-bert --global-rounds 10 --seed 7\n"
            "  fleetune demo --out runs/lab --broker mqtt://127.0.0.1:1883      use a broker that runs already\n"
        ),
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=("fedms", "pfedmoe"),
        default="fedms",
        help="fedms: all boards have one backbone; pfedmoe: small boards have one of fewer blocks, and all share a "
        "small extractor (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        choices=("text", "images"),
        default="text",
        help="text: MiniLM on film reviews; images: a ViT on Fashion-MNIST (default: %(default)s)",
    )
    parser.add_argument(
        "--backbone", metavar="DIR", type=Path, help="folder in Hugging Face format to use instead of the task's own"
    )
    parser.add_argument("--broker", metavar="URL", help="a broker that runs already (default: the embedded one)")
    parser.add_argument(
        "--samples",
        type=int,
        default=300,
        metavar="N",
        help="training samples of each device; a quarter as many validate, half as many test (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_job_options(parser, jobs="the method and both baselines", max_depth=4)
    parser.set_defaults(run=_run)


_DEVICES = 4
"""In the demo's fleet."""

_OWN = {"run", "command", "out", "json", "broker"}
_TRAINED = (
    "global_rounds",
    "personal_rounds",
    "epochs",
    "batch",
    "optimiser",
    "learning_rate",
    "weight_decay",
    "max_depth",
    "sal_start",
    "sal_step",
    "sal_window",
    "sal_threshold",
    "gate_rank",
    "gate_learning_rate",
    "shared_learning_rate",
    "gate",
    "gate_split",
    "mix",
    "rule",
    "assume_malicious",
    "seed",
)


def _run(args: argparse.Namespace) -> None:
    import json

    from fleetune.edge.protocol.address import BrokerAddress
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.tools.assets import fetch
    from fleetune.tools.jobs import check_options, check_rule, rule_of
    from fleetune.tools.require import require_server_extra

    require_server_extra()
    if args.samples < 16:
        raise ConfigError(f"--samples: {args.samples} is out of range", "use 16 or more")
    check_options(args)
    check_rule(rule_of(args), updates=_DEVICES)
    jobs = args.jobs or ["frozen-head", "standalone", args.method]
    other = "fedms" if args.method == "pfedmoe" else "pfedmoe"
    if args.method not in jobs or other in jobs:
        raise ConfigError(
            f"--job: {', '.join(jobs)} with --method {args.method}",
            f"add --job {args.method} and leave out --job {other}: the report is about {args.method}",
        )

    from fleetune.tools.demo.folder import RunFolder
    from fleetune.tools.demo.run import DemoOptions, check_report, print_summary, run_demo
    from fleetune.tools.demo.task import Task
    from fleetune.tools.terminal import open_console

    trained = [part for job in jobs for part in ("--job", job)]
    for name in _TRAINED:
        if getattr(args, name) is not None:
            trained += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    task = Task(args.task, args.backbone, args.samples, args.samples // 4, args.samples // 2, args.seed)
    if args.backbone is not None:
        fetch(task.backbone, local=args.backbone)  # a wrong path is found before the run's folder is taken
    options = DemoOptions(
        task=task,
        method=args.method,
        jobs=trained,
        max_depth=args.max_depth,
        epochs=args.epochs,
        batch=args.batch,
        broker=BrokerAddress.parse(args.broker) if args.broker else None,
        record={
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if name not in _OWN
        }
        | {"jobs": jobs},
    )
    logging.getLogger("fleetune").setLevel(logging.WARNING)  # what goes well is in the table
    folder = RunFolder(args.out)
    console = open_console(stderr=args.json)
    try:
        report = run_demo(folder, options, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with the run in {folder.path}", soft_wrap=True)
        raise
    if args.json:
        print(json.dumps({"report": str(folder.report), **report["summary"]}, indent=2))  # noqa: T201
    else:
        print_summary(report, folder, console)
    check_report(report)
