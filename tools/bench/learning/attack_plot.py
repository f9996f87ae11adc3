"""The picture of ``fleetune bench attacks``: a panel for each attack, a line for each rule."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleetune.edge.protocol.files import write_atomic

_COLOURS = ("#868e99", "#2a7ab9", "#10946f", "#c97b04", "#b2559a")
_STYLES = (":", "-", "-", "--", "-.")
_INK = "#5f6b7a"
_COLUMNS = 3


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        panel: What it is about.
        rule: The rule.
        points: Share of malicious devices → what came of it.
    """

    panel: str
    rule: str
    points: Mapping[float, float]


def draw(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """Write the picture as PNG.

    Args:
        path: The file.
        title: What was run.
        curves: Its lines.
    """
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    rules = list(dict.fromkeys(curve.rule for curve in curves))
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(12, 3.3 * rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True, sharey=True).flat)
    for spare in grid[len(panels) :]:
        spare.remove()
    for axes, panel in zip(grid, panels, strict=False):
        for curve in curves:
            if curve.panel == panel:
                style = rules.index(curve.rule)
                axes.plot(
                    list(curve.points),
                    list(curve.points.values()),
                    label=curve.rule,
                    color=_COLOURS[style],
                    linestyle=_STYLES[style],
                    marker="o",
                    markersize=3.5,
                )
        axes.set_title(panel, fontsize=10, color=_INK)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xticks(sorted(next(curve.points for curve in curves if curve.panel == panel)))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) - min(len(panels), _COLUMNS) : len(panels)]:
        axes.set_xlabel("malicious devices", color=_INK)
    for axes in grid[: len(panels) : _COLUMNS]:
        axes.set_ylabel("accuracy on unseen pictures", color=_INK)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rules), fontsize=9, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_atomic(path, data.getvalue())
