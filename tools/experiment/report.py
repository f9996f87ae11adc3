"""What an experiment comes to: a table for each split, and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.bench.figures import Grid
from fleetune.tools.experiment.run import Record, Setting

_INK = "#5f6b7a"
_COLOURS = ("#b2559a", "#868e99", "#2a7ab9", "#10946f", "#c97b04", "#d0432f", "#5b6abf", "#3f8f9f", "#a07f2a")


@dataclass(frozen=True)
class Row:
    """One method on one split.

    Attributes:
        split: The split.
        method: The method.
        best: Best round, mean over the seeds.
        best_spread: Its standard deviation over the seeds; None for one seed.
        last: Last round, likewise.
        last_spread: Its standard deviation.
        target: Accuracy that costs are counted to.
        lead: Of its best round over pFedMoE's, seed by seed: negative where pFedMoE is better.
        lead_spread: Its standard deviation.
        rounds: Rounds to the target, mean over the seeds; None where one never gets there.
        sent: Numbers that went up and down by then.
        gflop: 10⁹ floating-point operations of training by then.
        seconds: Seconds of training by then, on this machine.
    """

    split: str
    method: str
    best: float
    best_spread: float | None
    last: float
    last_spread: float | None
    target: float
    lead: float
    lead_spread: float | None
    rounds: float | None
    sent: float | None
    gflop: float | None
    seconds: float | None


def rows(records: Sequence[Record], target: float | None = None) -> list[Row]:
    """A row for each split and method.

    Args:
        records: All cases.
        target: Accuracy that costs are counted to; by default, for each split, what stand-alone training reaches at
            its best, or the worst of the methods without it.
    """
    found = []
    for split in dict.fromkeys(record.case.split for record in records):
        here = [record for record in records if record.case.split == split]
        methods = list(dict.fromkeys(record.case.method for record in here))
        of = {method: [record for record in here if record.case.method == method] for method in methods}
        goal = target if target is not None else _target(of)
        for method, runs in of.items():
            leads = [run.best - other.best for run, other in zip(runs, of[methods[0]], strict=True)]
            ends = [run.reaches(goal) for run in runs]
            reached = [(run, end - 1) for run, end in zip(runs, ends, strict=True) if end is not None]
            whole = len(reached) == len(runs)
            found.append(
                Row(
                    split,
                    method,
                    *_mean([run.best for run in runs]),
                    *_mean([run.accuracy[-1] for run in runs]),
                    goal,
                    *_mean(leads),
                    rounds=fmean(end + 1 for _, end in reached) if whole else None,
                    sent=fmean(run.sent[end] for run, end in reached) if whole else None,
                    gflop=fmean(run.flops[end] for run, end in reached) / 1e9 if whole else None,
                    seconds=fmean(run.seconds[end] for run, end in reached) if whole else None,
                )
            )
    return found


def _target(of: dict[str, list[Record]]) -> float:
    best = {method: fmean(run.best for run in runs) for method, runs in of.items()}
    return best.get("standalone", min(best.values()))


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    return fmean(values), stdev(values) if len(values) > 1 else None


def grid(split: str, found: Sequence[Row]) -> Grid:
    """The table of a split."""
    first = found[0].method
    target = f"{100 * found[0].target:.1f} %"
    title = f"{split}: accuracy in %; lead beside {first} in points; what it takes to reach {target}"
    return Grid(
        title,
        ("method", "best round", "last round", "lead", "rounds", "MB sent", "GFLOP", "s"),
        [
            (
                row.method,
                _points(row.best, row.best_spread),
                _points(row.last, row.last_spread),
                "" if row is found[0] else _points(row.lead, row.lead_spread, sign="+"),
                *("never" if value is None else f"{scale * value:,.0f}" for value, scale in _costs(row)),
            )
            for row in found
        ],
    )


def _points(value: float, spread: float | None, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _costs(row: Row) -> list[tuple[float | None, float]]:
    return [(row.rounds, 1), (row.sent, 4e-6), (row.gflop, 1), (row.seconds, 1)]


def document(setting: Setting, records: Sequence[Record], found: Sequence[Row]) -> dict[str, Any]:
    """All of it, as JSON."""
    return {
        "setting": msgspec.to_builtins(setting),
        "rows": [asdict(row) for row in found],
        "runs": [msgspec.to_builtins(record) for record in records],
    }


def draw(path: Path, title: str, records: Sequence[Record]) -> None:
    """Accuracy by rounds, a panel for each split, a line for each method: the mean over the seeds, and their range."""
    splits = list(dict.fromkeys(record.case.split for record in records))
    methods = list(dict.fromkeys(record.case.method for record in records))
    figure = Figure(figsize=(5.4 * len(splits) + 1, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    panels = list(figure.subplots(1, len(splits), squeeze=False, sharey=False).flat)
    for axes, split in zip(panels, splits, strict=True):
        for number, method in enumerate(methods):
            runs = [r.accuracy for r in records if (r.case.split, r.case.method) == (split, method)]
            if not runs:
                continue
            by_round = list(zip(*runs, strict=True))
            numbers = range(1, len(by_round) + 1)
            colour, first = _COLOURS[number % len(_COLOURS)], number == 0
            axes.plot(
                numbers, [fmean(some) for some in by_round], label=method, color=colour, linewidth=2.4 if first else 1.3
            )
            low, high = [min(some) for some in by_round], [max(some) for some in by_round]
            axes.fill_between(numbers, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.set_title(split, fontsize=10, color=_INK)
        axes.set_xlabel("round", color=_INK)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy on clients' own unseen pictures", color=_INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomic(path, data.getvalue())
