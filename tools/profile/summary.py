"""What a measured table says: predictions for people, and how far the model is from its own trials."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.trial import Trial
from fleetune.tools.text import columns

MICRO_BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class Cell:
    """A prediction.

    Attributes:
        depth: Active blocks.
        recompute: Whether activations are recomputed.
        micro_batch: Samples a step.
        length: Tokens of a sample.
        peak_mib: Peak of the process.
        step_s: Seconds of a step.
        step_cpu_s: Its CPU seconds.
    """

    depth: int
    recompute: bool
    micro_batch: int
    length: int
    peak_mib: float
    step_s: float
    step_cpu_s: float


@dataclass(frozen=True)
class Fit:
    """Relative errors of the model on its own trials: median and largest, of the peak and of a step's time."""

    peak: tuple[float, float]
    step: tuple[float, float]


def fit(costs: Costs) -> Fit:
    """How well the model fits."""
    peak, step = errors(costs, costs.trials)
    return Fit((statistics.median(peak), max(peak)), (statistics.median(step), max(step)))


def errors(costs: Costs, trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """How far predictions are from trials, relative to these: of the peak, and of a step's time."""
    peaks, steps = list[float](), list[float]()
    for trial in trials:
        cell = predict(costs, trial.depth, trial.micro_batch, trial.length, recompute=trial.recompute)
        peak_mib = trial.base_mib - costs.model.base_mib + cell.peak_mib  # a process begins with what it has loaded
        peaks.append(abs(peak_mib / trial.peak_mib - 1))
        steps.append(abs(cell.step_s / trial.step_s - 1))
    return peaks, steps


def predict(costs: Costs, depth: int, micro_batch: int, length: int, *, recompute: bool) -> Cell:
    """One prediction."""
    model = costs.model
    seconds, cpu = model.step_s(depth, micro_batch, length, recompute=recompute)
    growth = model.growth_mib(depth, micro_batch, length, recompute=recompute)
    return Cell(depth, recompute, micro_batch, length, model.base_mib + growth, seconds, cpu)


def table(costs: Costs, blocks: int) -> list[Cell]:
    """Predictions for samples as long as the longest that was measured, at every depth that the trials cover."""
    return [
        predict(costs, depth, micro_batch, costs.length, recompute=recompute)
        for depth in range(1, blocks + 1)
        for recompute in (False, True)
        for micro_batch in MICRO_BATCHES
        if costs.covers(depth, micro_batch, costs.length, recompute=recompute)
    ]


def text(cells: list[Cell], budget_mib: float | None) -> str:
    """A table for people: a row for each depth and policy; in brackets what a budget does not allow."""
    found = {(cell.depth, cell.recompute, cell.micro_batch): cell for cell in cells}
    head = ["depth", "activations", *(f"MiB at {size}" for size in MICRO_BATCHES)]
    head += [f"s at {size}" for size in MICRO_BATCHES]
    rows = [head]
    for depth, recompute in dict.fromkeys((cell.depth, cell.recompute) for cell in cells):
        row = [found.get((depth, recompute, size)) for size in MICRO_BATCHES]
        rows.append(
            [
                str(depth),
                "recomputed" if recompute else "kept",
                *("-" if cell is None else _mib(cell.peak_mib, budget_mib) for cell in row),
                *("-" if cell is None else f"{cell.step_s:.3f}" for cell in row),
            ]
        )
    return columns(rows)


def threads_in_words(costs: Costs) -> str:
    """How many threads the trials had."""
    return {0: "a thread for each core", 1: "1 thread"}.get(costs.threads, f"{costs.threads} threads")


def _mib(peak: float, budget_mib: float | None) -> str:
    return f"[{peak:.0f}]" if budget_mib is not None and peak > budget_mib else f"{peak:.0f}"
