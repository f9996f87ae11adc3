"""``fleetune bench attacks``: what each rule is worth against malicious devices, and what it costs without any."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fleetune.edge.protocol.files import write_atomic
from fleetune.server.job import RuleSettings
from fleetune.server.rules import RULES
from fleetune.tools.assets import fetch
from fleetune.tools.bench.figures import Document, Figure, Grid, figure
from fleetune.tools.bench.learning.attack_fleet import Case, Outcome, Scale, World, run_case, write_prefix, write_world
from fleetune.tools.bench.learning.attack_plot import Curve, draw
from fleetune.tools.bench.learning.attackers import ATTACKS, BACKDOOR, Attack
from fleetune.tools.demo.task import Task

PEERS: dict[str, str] = {}

ASSUMED = 0.3
"""Share of malicious devices that rules are told to withstand: the largest that attacks."""

_ALIKE = 100.0
"""Concentration from which on devices have all classes alike."""

_NO_BOUNDS = "mean, no bounds"
_INFINITE = float("inf")
_RULES: dict[str, RuleSettings] = {
    _NO_BOUNDS: RuleSettings("mean", clip=_INFINITE, outlier=_INFINITE, weight=_INFINITE),
    **{name: RuleSettings(name, malicious=ASSUMED) for name in RULES},
}


@dataclass(frozen=True)
class Sweep:
    """What is run.

    Attributes:
        scale: Size of the fleets.
        seeds: Each with samples, initial values and malicious devices of its own.
        alpha: How skewed classes are among the devices where there are attacks.
        alphas: The same where there are none.
        malicious: Devices that attack.
        attacks: What they do.
        rules: Rules by their names here.
    """

    scale: Scale
    seeds: tuple[int, ...]
    alpha: float
    alphas: tuple[float, ...]
    malicious: tuple[int, ...]
    attacks: tuple[Attack, ...]
    rules: tuple[str, ...]

    def worlds(self) -> Iterator[World]:
        """All samples that are dealt out."""
        return (World(seed, alpha) for seed in self.seeds for alpha in self.alphas)

    def cases(self) -> Iterator[Case]:
        """All runs, those of the same samples together."""
        for world in self.worlds():
            for name in self.rules:
                yield Case(world, _RULES[name])
                if world.alpha == self.alpha:
                    for attack in self.attacks:
                        yield from (Case(world, _RULES[name], attack.name, count) for count in self.malicious)

    def share(self, malicious: int) -> str:
        """Malicious devices in percent."""
        return f"{100 * malicious / self.scale.devices:.0f} %"


FULL = Sweep(
    scale=Scale(devices=10, train=160, rounds=8, test=500),
    seeds=(0, 1, 2),
    alpha=1.0,
    alphas=(_ALIKE, 1.0, 0.3),
    malicious=(1, 2, 3),
    attacks=ATTACKS,
    rules=tuple(_RULES),
)
QUICK = Sweep(
    scale=Scale(devices=5, train=40, rounds=2, test=60),
    seeds=(0,),
    alpha=_ALIKE,
    alphas=(_ALIKE,),
    malicious=(1,),
    attacks=tuple(attack for attack in ATTACKS if attack.name in ("reversed, x 10", BACKDOOR)),
    rules=(_NO_BOUNDS, "mean", "median"),
)


def bench_attacks(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For the pack, samples, the picture and the tables.
        quick: A few small runs that show that it works, and nothing else.
        peers: None: nobody else is measured.
        threads: Runs at once, each with one thread.
        say: Is told what happens next.
    """
    del peers
    sweep = QUICK if quick else FULL
    say("packs the backbone")
    Task("images", None, 1, 1, 1, 0).write_pack(folder / "pack")
    found = _run(sweep, folder, threads, say)
    results = _Results(sweep, found)
    grids = tuple(_grids(sweep, results))
    picture, tables = folder / "attacks.png", folder / "attacks.md"
    draw(picture, _title(sweep), list(_curves(sweep, results)))
    write_atomic(tables, "\n\n".join(grid.as_markdown() for grid in grids).encode() + b"\n")
    notes = [*_notes(sweep, results), f"picture: {picture}", f"tables in Markdown: {tables}"]
    return Document("attacks", tuple(_figures(sweep, results)), notes=tuple(notes), grids=grids)


def _run(sweep: Sweep, folder: Path, threads: int, say: Callable[[str], None]) -> dict[Case, Outcome]:
    root, pack, cases = folder / "worlds", folder / "pack", list(sweep.cases())
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the processes to come
    with ProcessPoolExecutor(threads, multiprocessing.get_context("spawn")) as pool:
        try:
            source, most, files = fetch("fashion-mnist"), max(sweep.malicious), list[Path]()
            for world in sweep.worlds():
                attacks = sweep.attacks if world.alpha == sweep.alpha else ()
                files += write_world(root, source, world, sweep.scale, malicious=most, attacks=attacks)
            prefixes = [pool.submit(write_prefix, pack, file) for file in files]
            for done, prefix in enumerate(as_completed(prefixes)):
                prefix.result()
                say(f"frozen blocks: {done + 1} of {len(files)} sets of pictures")
            runs: dict[Future[Outcome], Case] = {
                pool.submit(run_case, root, pack, sweep.scale, case): case for case in cases
            }
            found = {}
            for run in as_completed(runs):
                found[runs[run]] = run.result()
                say(f"{len(found)} of {len(cases)} runs")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


@dataclass(frozen=True)
class _Place:
    """What rules are compared in.

    Attributes:
        alpha: How skewed classes are.
        attack: Name of the attack; empty for none.
        malicious: Devices that attack.
    """

    alpha: float
    attack: str = ""
    malicious: int = 0


class _Results:
    """Outcomes of all runs, by place and rule."""

    def __init__(self, sweep: Sweep, found: Mapping[Case, Outcome]) -> None:
        self._sweep, self.found = sweep, found

    def of(self, place: _Place, rule: str) -> list[Outcome]:
        """One for each seed."""
        worlds = (World(seed, place.alpha) for seed in self._sweep.seeds)
        return [self.found[Case(world, _RULES[rule], place.attack, place.malicious)] for world in worlds]

    def accuracy(self, place: _Place, rule: str) -> float:
        """Median over the seeds."""
        return median(outcome.accuracy for outcome in self.of(place, rule))

    def fooled(self, place: _Place, rule: str) -> float:
        """Median over the seeds."""
        return median(outcome.fooled for outcome in self.of(place, rule))


def _title(sweep: Sweep) -> str:
    scale, seeds = sweep.scale, len(sweep.seeds)
    return (
        f"Fashion-MNIST, {scale.devices} devices of {scale.train} pictures, {scale.rounds} rounds, "
        f"{f'median of {seeds} seeds' if seeds > 1 else 'one seed'}"
    )


# --- what is reported -------------------------------------------------------------------------------------------


def _figures(sweep: Sweep, results: _Results) -> Iterator[Figure]:
    for rule in sweep.rules:
        for alpha in sweep.alphas:
            outcomes = results.of(_Place(alpha), rule)
            yield figure(f"no attack, alpha {alpha:g}, {rule}: accuracy", "", [one.accuracy for one in outcomes])
        outcomes = results.of(_Place(sweep.alpha), rule)
        yield figure(f"no attack, {rule}: fooled by the trigger", "", [one.fooled for one in outcomes])
        for attack in sweep.attacks:
            for count in sweep.malicious:
                outcomes = results.of(_Place(sweep.alpha, attack.name, count), rule)
                name = f"{attack.name}, {sweep.share(count)} malicious, {rule}"
                yield figure(f"{name}: accuracy", "", [one.accuracy for one in outcomes])
                if attack.name == BACKDOOR:
                    yield figure(f"{name}: fooled by the trigger", "", [one.fooled for one in outcomes])


def _grids(sweep: Sweep, results: _Results) -> Iterator[Grid]:
    def cells(value: Callable[[_Place, str], float], place: _Place) -> list[str]:
        return [f"{100 * value(place, rule):.1f} %" for rule in sweep.rules]

    def attacks(value: Callable[[_Place, str], float], attack: str) -> Iterator[list[str]]:
        for count in sweep.malicious:
            yield [attack, sweep.share(count), *cells(value, _Place(sweep.alpha, attack, count))]

    skews = {
        alpha: "alike on all devices" if alpha >= _ALIKE else f"Dirichlet, α = {alpha:g}" for alpha in sweep.alphas
    }
    yield Grid(
        "accuracy without attackers",
        ("classes", *sweep.rules),
        [[skews[alpha], *cells(results.accuracy, _Place(alpha))] for alpha in sweep.alphas],
    )
    yield Grid(
        f"accuracy under attack, classes: {skews[sweep.alpha]}",
        ("attack", "malicious", *sweep.rules),
        [row for attack in sweep.attacks for row in attacks(results.accuracy, attack.name)],
    )
    yield Grid(
        "pictures with the backdoor's trigger that are taken for its target",
        ("attack", "malicious", *sweep.rules),
        [
            ["none", sweep.share(0), *cells(results.fooled, _Place(sweep.alpha))],
            *attacks(results.fooled, BACKDOOR),
        ],
    )


def _curves(sweep: Sweep, results: _Results) -> Iterator[Curve]:
    panels = [(attack.name, attack.name, results.accuracy) for attack in sweep.attacks]
    panels.append((f"{BACKDOOR}: pictures with the trigger that fool it", BACKDOOR, results.fooled))
    for panel, attack, value in panels:
        for rule in sweep.rules:
            points = {0.0: value(_Place(sweep.alpha), rule)} | {
                count / sweep.scale.devices: value(_Place(sweep.alpha, attack, count), rule)
                for count in sweep.malicious
            }
            yield Curve(panel, rule, points)


def _notes(sweep: Sweep, results: _Results) -> Iterator[str]:
    found = results.found
    yield f"{_title(sweep)}; rules are told that {100 * ASSUMED:.0f} % are malicious"
    norms = [norm for case, outcome in found.items() if not case.malicious for norm in outcome.norms]
    yield f"norms of honest updates: {min(norms):.2f} to {max(norms):.2f} of the median of their round"
    refused = sum(outcome.refused_honest for outcome in found.values())
    yield f"honest updates that were refused as outliers: {refused}"
    for attack in sweep.attacks:
        runs = {case: outcome for case, outcome in found.items() if case.attack == attack.name}
        sent = sum(case.malicious * sweep.scale.rounds for case in runs if case.rule != _RULES[_NO_BOUNDS])
        if count := sum(outcome.refused for outcome in runs.values()):
            yield f"{attack.name}: {count} of {sent} updates of attackers were refused as outliers"
