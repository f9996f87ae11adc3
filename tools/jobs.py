"""Turns the options of a command into the aggregator's jobs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import adapter_shapes
from fleetune.edge.engine.model import card_for
from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import DEFAULT
from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.modelfile import MAX_CLASSES
from fleetune.server.job import Job, JobPrivacy, RuleSettings, ScheduleSettings
from fleetune.server.rules import RULES
from fleetune.server.rules.base import assumed
from fleetune.server.training import Model

Figures = dict[str, float | int | str | bool]

ASSUMING = ("trimmed-mean", "multi-krum")
"""Rules that are told how many devices may lie."""


def check_options(args: argparse.Namespace) -> None:
    """Check what can be checked before there is a pack.

    Raises:
        ConfigError: An option is out of range.
    """
    least = {"batch": 1, "epochs": 1, "global_rounds": 1, "personal_rounds": 1, "sal_start": 1, "gate_rank": 1}
    least |= {"sal_step": 0, "sal_window": 2, "seed": 0, "max_depth": 1}
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is out of range", f"use {minimum} or more")
    for option, value, fits in (
        ("--learning-rate", args.learning_rate, 0 < args.learning_rate < math.inf),
        ("--shared-learning-rate", args.shared_learning_rate, 0 < args.shared_learning_rate < math.inf),
        ("--gate-learning-rate", args.gate_learning_rate, 0 < _or(args.gate_learning_rate, 1) < math.inf),
        ("--weight-decay", args.weight_decay, 0 <= args.weight_decay < math.inf),
        ("--sal-threshold", args.sal_threshold, math.isfinite(args.sal_threshold)),
    ):
        if not fits:
            raise ConfigError(f"{option}: {value} is out of range", "use a finite number, above zero for a rate")
    rule_of(args)


def rule_of(args: argparse.Namespace) -> RuleSettings:
    """The rule that ``--rule`` and ``--assume-malicious`` ask for.

    Raises:
        ConfigError: There is none of that name, the share is out of range, or says nothing to this rule.
    """
    if args.rule not in RULES:
        raise ConfigError(f"--rule: {args.rule} is unknown", f"choose from {', '.join(RULES)}")
    if args.assume_malicious is None:
        return RuleSettings(args.rule)
    if not 0 <= args.assume_malicious < 0.5:
        raise ConfigError(
            f"--assume-malicious: {args.assume_malicious} is out of range",
            "use 0 or more and less than 0.5: no rule tells a majority that lies from one that does not",
        )
    if args.rule not in ASSUMING:
        raise ConfigError(
            f"--assume-malicious: it says nothing to --rule {args.rule}", f"use --rule {' or '.join(ASSUMING)}"
        )
    return RuleSettings(args.rule, args.assume_malicious)


def check_rule(rule: RuleSettings, *, updates: int) -> None:
    """See that a rule can do what is asked of it in rounds of so many updates.

    Raises:
        ConfigError: They are too few.
    """
    if rule.name not in ASSUMING:
        return
    asked, most = assumed(rule.malicious, updates, updates), RULES[rule.name].tolerates(updates)
    if asked > most:
        raise ConfigError(
            f"--rule {rule.name}: --assume-malicious {rule.malicious:g} of the {updates} updates that close a round "
            f"are {asked}, and of those it withstands {most}",
            "assume fewer, have more devices in a round, or use --rule median, which withstands just under half",
        )


def build_jobs(
    args: argparse.Namespace,
    manifest: Manifest,
    *,
    classes: int,
    codec: str = DEFAULT,
    privacy: JobPrivacy | None = None,
) -> tuple[Job, ...]:
    """The jobs that ``--job`` and its companions ask for.

    Where updates get noise only one factor of the adapters is trained together: with noise in both, their product has
    it squared (FFA-LoRA, Sun et al. 2024).

    Raises:
        ConfigError: An option is out of range.
    """
    check_options(args)
    max_depth = args.max_depth if args.max_depth is not None else manifest.blocks
    if max_depth > manifest.blocks:
        raise ConfigError(f"--max-depth: {max_depth} is out of range", f"choose from 1 to {manifest.blocks}")
    if not 2 <= classes <= MAX_CLASSES:
        raise ConfigError(f"--classes: {classes} is out of range", f"a task has 2 to {MAX_CLASSES} classes")
    if args.gate_rank > manifest.width:
        raise ConfigError(f"--gate-rank: {args.gate_rank} is out of range", f"choose from 1 to {manifest.width}")
    methods = list(dict.fromkeys(args.jobs or ["fedms"]))
    if "pfedmoe" in methods and manifest.extractor is None:
        raise ConfigError(
            "--job pfedmoe: the pack has no extractor to share", "write it again, with `fleetune pack --extractor`"
        )
    common: Figures = {
        "classes": classes,
        "seed": args.seed,
        "max_depth": max_depth,
        "epochs": args.epochs,
        "batch": args.batch,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
    }
    if privacy is not None:
        common["factors"] = "B"
    adapters: Figures = {"rank": manifest.rank, "targets": ",".join(manifest.targets)}
    gate: Figures = {"gate_epochs": 5, "gate_split": args.gate_split}
    own: dict[str, Figures] = {
        "fedms": {
            **(adapters | gate),
            "gate_rank": args.gate_rank,
            "gate_learning_rate": _or(args.gate_learning_rate, 1e-4),
            "mix": args.mix,
        },
        "pfedmoe": {
            **gate,
            "representation": 0 if manifest.extractor is None else manifest.extractor.representation,
            "shared_learning_rate": args.shared_learning_rate,
            "gate_learning_rate": _or(args.gate_learning_rate, 1e-3),
            "gate": args.gate,
        },
    }
    every = {"train": args.global_rounds + args.personal_rounds}
    rounds = {
        "fedms": {"global": args.global_rounds, "personal": args.personal_rounds},
        "frozen-head": {"train": 1},
    }
    return tuple(
        Job(
            id=method,
            method=method,
            **_alike(method, manifest, mixed="pfedmoe" in methods),
            shapes=_shapes(method, manifest, classes, args.gate_rank, private=privacy is not None),
            rounds=rounds.get(method, every),
            settings=common | own.get(method, adapters),
            schedule=ScheduleSettings(args.sal_start, args.sal_step, args.sal_window, args.sal_threshold),
            codec=codec,
            rule=rule_of(args),
            privacy=privacy,
        )
        for method in methods
    )


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _alike(method: str, manifest: Manifest, *, mixed: bool) -> dict[str, str]:
    """What the packs of all devices have in common: one backbone, or of several backbones the extractor, or nothing."""
    if method == "pfedmoe" and manifest.extractor is not None:
        return {"backbone": manifest.extractor.sha256, "quantisation": ""}
    if mixed and method in ("standalone", "frozen-head"):
        return {"backbone": "", "quantisation": ""}
    return {"backbone": manifest.backbone.sha256, "quantisation": manifest.quantisation.type}


def _shapes(
    method: str, manifest: Manifest, classes: int, gate_rank: int, *, private: bool
) -> dict[str, tuple[int, ...]]:
    """What devices may send."""
    if method == "pfedmoe" and manifest.extractor is not None:
        return manifest.extractor.shapes
    shapes = Layout.of(manifest, classes).shapes | adapter_shapes(manifest.width, gate_rank)
    return {name: shape for name, shape in shapes.items() if not (private and name.endswith(".A"))}


def build_models(args: argparse.Namespace, jobs: Iterable[Job], pack: Pack) -> dict[str, Model]:
    """Job → what the model file of its global expert holds beside what was trained, but for the run's id."""
    return {
        job.id: Model(
            card_for(
                pack,
                kind="global",
                job=job.id,
                run="",
                classes=int(job.settings["classes"]),
                max_depth=int(job.settings["max_depth"]),
                mix=args.mix,
            ),
            Expert.initial(Layout.of(pack.manifest, int(job.settings["classes"])), int(job.settings["seed"])).tensors,
        )
        for job in jobs
        if job.method == "fedms"
    }
