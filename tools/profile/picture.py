"""The picture of a measured table: peak memory and time of a step against depth, with the budget's line."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.resources.costs import Costs
from fleetune.tools.profile.summary import Cell

_COLOURS = {1: "#10946f", 4: "#2a7ab9", 16: "#b2559a"}
_INK, _LIMIT = "#5f6b7a", "#d0432f"


def draw(path: Path, title: str, costs: Costs, cells: list[Cell], budget_mib: float | None) -> None:
    """Write the picture; its name's ending says whether as PNG, SVG or PDF.

    Args:
        path: The file.
        title: What was measured where.
        costs: Its trials at the longest sample are drawn as points.
        cells: Predictions, drawn as lines.
        budget_mib: The budget's line.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    memory, time = figure.subplots(1, 2)
    trials = [trial for trial in costs.trials if trial.length == costs.length]
    for micro_batch in dict.fromkeys(cell.micro_batch for cell in cells):
        for recompute in (False, True):
            line = [cell for cell in cells if (cell.micro_batch, cell.recompute) == (micro_batch, recompute)]
            depths = [cell.depth for cell in line]
            style = {"color": _COLOURS[micro_batch], "linestyle": ":" if recompute else "-", "linewidth": 1.8}
            label = f"micro-batch {micro_batch}, {'recomputed' if recompute else 'kept'}"
            memory.plot(depths, [cell.peak_mib for cell in line], label=label, **style)
            time.plot(depths, [cell.step_s for cell in line], **style)
    for trial in trials:
        point = {"color": _COLOURS.get(trial.micro_batch, _INK), "marker": "x" if trial.recompute else "o", "s": 26}
        memory.scatter(trial.depth, trial.peak_mib, **point)
        time.scatter(trial.depth, trial.step_s, **point)
    if budget_mib is not None:
        memory.axhline(budget_mib, color=_LIMIT, linewidth=1.6, label=f"budget, {budget_mib:.0f} MiB")
    _name(memory, "peak of the process, MiB")
    _name(time, "seconds of a step")
    memory.legend(fontsize=8, frameon=False)
    time.annotate(
        f"lines: the model; points: trials of {costs.length} tokens,\n● kept, × recomputed; grey: other micro-batches",
        (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=8, color=_INK,
    )  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix.lstrip(".").lower(), dpi=130)
    write_atomic(path, data.getvalue())


def _name(axes: Axes, what: str) -> None:
    axes.set_xlabel("active blocks")
    axes.set_ylabel(what)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
