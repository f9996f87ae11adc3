"""The picture of ``fleetune bench privacy``: accuracy against ε."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleetune.edge.protocol.files import write_atomic

_COLOURS = ("#c97b04", "#2a7ab9", "#868e99")
_INK = "#5f6b7a"

Point = tuple[float, float, dict[str, list[float]]]
"""ε against whoever has the model, ε against the aggregator, and expert → accuracy with each seed."""


@dataclass(frozen=True)
class Line:
    """One fleet at every ε; infinite is no noise."""

    name: str
    points: list[Point]


def draw(path: Path, lines: list[Line], alone: float) -> None:
    """Write the picture, a plot for each expert; its name's ending says whether as PNG, SVG or PDF.

    Args:
        path: The file.
        lines: Accuracies by ε.
        alone: Accuracy where every device learns alone.
    """
    experts = list(lines[0].points[0][2])
    picture = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, expert in zip(picture.subplots(1, len(experts), sharey=True), experts, strict=True):
        for line, colour in zip(lines, _COLOURS, strict=False):
            _draw_line(axes, line, expert, colour)
        axes.axhline(alone, color=_INK, linewidth=1.2, linestyle=":", label="each device alone")
        axes.set_title(expert, fontsize=11, color=_INK)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ε against whoever has the model; dashed: without noise")
        axes.set_xticks(epsilons := sorted({point[0] for line in lines for point in line.points} - {math.inf}))
        axes.set_xticklabels([f"{epsilon:g}" for epsilon in epsilons])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    first = picture.axes[0]
    first.set_ylabel("accuracy on test samples, mean and range over seeds")
    first.legend(fontsize=8, frameon=False)
    data = io.BytesIO()
    picture.savefig(data, format=path.suffix.lstrip(".").lower(), dpi=130)
    write_atomic(path, data.getvalue())


def _draw_line(axes: Axes, line: Line, expert: str, colour: str) -> None:
    private = sorted((point for point in line.points if math.isfinite(point[0])), key=lambda point: point[0])
    epsilons = [point[0] for point in private]
    values = [point[2][expert] for point in private]
    axes.plot(epsilons, [fmean(some) for some in values], color=colour, marker="o", linewidth=1.8, label=line.name)
    axes.fill_between(
        epsilons, [min(some) for some in values], [max(some) for some in values], color=colour, alpha=0.15
    )
    for point in line.points:
        if math.isinf(point[0]):
            axes.axhline(fmean(point[2][expert]), color=colour, linewidth=1.2, linestyle="--")
