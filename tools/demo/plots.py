"""The plots of a report, as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fleetune.tools.demo.report import training_rounds

Device = Mapping[str, Any]
Series = dict[int, float]

COLOURS = {
    "ink": "#5f6b7a",
    "muted": "#7c8796",
    "grid": "#98a2af",
    "frozen-head": "#868e99",
    "standalone": "#c97b04",
    "global": "#2a7ab9",
    "local": "#10946f",
    "mixture": "#b2559a",
    "predicted": "#9aa5b1",
    "measured": "#3a7fb8",
    "schedule": "#d79b21",
    "over": "#d0432f",
}
"""Name → a mid-tone that reads on white and on black; the page may redefine it as ``--plot-<name>``.

The hues are those of Okabe and Ito, which people with any colour vision can tell apart. No two names share a
value, because the value is what is replaced by the page's variable.
"""

_WIDTH = 920
_COLUMNS = 4
_POINTS = 72
_HEADROOM = 0.2
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fleetune",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": COLOURS["ink"],
    "axes.titlesize": 13,
    "axes.titlecolor": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": COLOURS["grid"],
    "grid.alpha": 0.28,
    "xtick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.color": COLOURS["grid"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.left": False,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.hspace": 0.06,
    "figure.constrained_layout.wspace": 0.05,
}

_NOTE: Mapping[str, Any] = {"textcoords": "offset points", "fontsize": 11, "color": COLOURS["muted"]}
_LIMIT: Mapping[str, Any] = {"color": COLOURS["ink"], "linewidth": 2.4}
_PLAN: Mapping[str, Any] = {"color": COLOURS["ink"], "linewidth": 1.6, "linestyle": (0, (4, 1.8))}
_SCHEDULE: Mapping[str, Any] = {"color": COLOURS["schedule"], "linewidth": 6.0, "alpha": 0.45}
_FORECAST: Mapping[str, Any] = {"color": COLOURS["muted"], "linewidth": 1.6, "linestyle": ":"}

_LINES: Mapping[str, Mapping[str, Any]] = {
    "frozen-head": {"label": "frozen backbone + head", "linestyle": ":", "linewidth": 1.8},
    "standalone": {
        "label": "stand-alone adapters",
        "linestyle": (0, (4, 1.8)),
        "linewidth": 1.7,
        "marker": "s",
        "markersize": 3.6,
    },
    "global": {"linewidth": 2.0, "marker": "o", "markersize": 4.4},
    # The gate often follows one expert, so the mixture runs on top of a broad local line.
    "local": {"linewidth": 6.0, "alpha": 0.42, "solid_capstyle": "round"},
    "mixture": {"linewidth": 1.8, "marker": "D", "markersize": 4.2},
}


METHODS = {"fedms": "FedMS", "pfedmoe": "pFedMoE"}
"""Method that a report is about → how it is written."""

_PARTS = {
    "fedms": {"global": "global expert", "local": "local expert", "mixture": "mixture"},
    "pfedmoe": {"global": "shared extractor alone", "local": "private model alone", "mixture": "mixture"},
}


def _line(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """How a line of the accuracies is drawn."""
    method, style = report["method"], _LINES[name]
    return style if "label" in style else {"label": f"{METHODS[method]}: {_PARTS[method][name]}", **style}


def accuracy(report: Mapping[str, Any]) -> str:
    """Test accuracy by rounds of training, one panel a device."""
    devices = report["devices"]

    def draw(figure: Figure) -> None:
        drawn = set()
        panels = _panels(figure, devices, share_y=True)
        for axes, device in zip(panels, devices, strict=True):
            series = accuracy_series(device)
            for name, points in series.items():
                if points:
                    drawn.add(name)
                    axes.plot(list(points), list(points.values()), color=COLOURS[name], **_line(report, name))
            head = device["accuracy"].get("frozen_head")
            if head is not None:
                drawn.add("frozen-head")
                axes.axhline(head, color=COLOURS["frozen-head"], **_line(report, "frozen-head"))
            if series["mixture"] and report["method"] == "fedms":
                _stage_two(axes, min(series["mixture"]), max(series["mixture"]))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(low, high + _HEADROOM * (high - low))
        _name_axes(panels, x="rounds of training", y="test accuracy")
        styles = {name: _line(report, name) for name in _LINES if name in drawn}
        _legend(figure, [Line2D([], [], color=COLOURS[name], **style) for name, style in styles.items()])

    ends = {
        device["id"]: ", ".join(
            f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in device["accuracy"].items()
        )
        for device in devices
    }
    texts = [f"{device} ends with {end}" for device, end in ends.items()]
    return _render("accuracy", "Test accuracy by rounds of training", texts, _rows(devices) * 210 + 62, draw)


def accuracy_series(device: Device) -> dict[str, Series]:
    """Line → rounds of training that the score follows → test accuracy.

    A device scores the global expert that it receives, before it trains on, so what round ``r`` reports is
    the global expert after ``r - 1`` rounds, and the last global expert is scored in stage 2. There both
    experts start as that one, and the final evaluation, which trains nothing, takes the place of the last
    round's scores. In pFedMoE it scores all parts after it has trained them.
    """
    lines: dict[str, Series] = {"standalone": {}, "global": {}, "local": {}, "mixture": {}}
    for entry in device["history"]:
        kind, number = (entry["job"], entry["stage"]), entry["round"]
        if kind == ("standalone", "train"):
            lines["standalone"][number] = entry["test"]
        elif kind == ("fedms", "global"):
            lines["global"][number - 1] = entry["test"]
        elif kind == ("pfedmoe", "train"):
            for name in ("global", "local", "mixture"):
                lines[name][number] = entry[f"test_{name}"]
        elif kind in (("fedms", "personal"), ("fedms", "evaluate")):
            if not lines["mixture"]:
                for name in ("global", "local", "mixture"):
                    lines[name][number - 1] = entry["test_global"]
            after = number if entry["stage"] == "personal" else number - 1
            lines["local"][after] = entry["test_local"]
            lines["mixture"][after] = entry["test_mixture"]
    return lines


def memory(report: Mapping[str, Any]) -> str:
    """Predicted and measured peak against the budget, a group of bars for each device."""
    devices = report["devices"]
    budgets = [device["budget_mib"] for device in devices]
    peaks = [device["peak_mib"] for device in devices]
    predicted = [device["plan"]["peak_mib"] for device in devices]
    colours = [COLOURS["over" if over else "measured"] for over in _over(peaks, budgets)]
    notes = [
        f"{peak:.1f} of {budget:.1f} MiB" + (", over budget" if peak > budget else "")
        for peak, budget in zip(peaks, budgets, strict=True)
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = range(len(devices))
        axes.barh([row - 0.17 for row in rows], predicted, 0.26, color=COLOURS["predicted"])
        axes.barh([row + 0.17 for row in rows], peaks, 0.26, color=colours)
        axes.vlines(budgets, [row - 0.4 for row in rows], [row + 0.4 for row in rows], **_LIMIT)
        for row, note, end in zip(rows, notes, map(max, budgets, peaks, predicted), strict=True):
            axes.annotate(note, (end, row), (9, 0), textcoords="offset points", va="center", fontsize=12)
        axes.set_yticks(
            list(rows), [_short(device["id"], 28) for device in devices], color=COLOURS["ink"], weight="bold"
        )
        axes.set_ylim(len(devices) - 0.4, -0.6)
        axes.set_xlim(0, max(*budgets, *peaks, *predicted) * 1.28)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("memory of the process in MiB", loc="left")
        _legend(
            figure,
            [
                Patch(color=COLOURS["predicted"], label="predicted peak of the plan"),
                Patch(color=COLOURS["measured"], label="measured peak"),
                Line2D([], [], label="budget", **_LIMIT),
                *([Patch(color=COLOURS["over"], label="over budget")] if COLOURS["over"] in colours else []),
            ],
        )

    texts = [
        f"{device['id']}: measured {note}, predicted {peak:.1f} MiB"
        for device, note, peak in zip(devices, notes, predicted, strict=True)
    ]
    return _render("memory", "Peak memory against budget", texts, 54 * len(devices) + 85, draw)


def cpu(report: Mapping[str, Any]) -> str:
    """CPU seconds of every training round against the budget, one panel and scale a device."""
    devices = report["devices"]

    def draw(figure: Figure) -> None:
        broken = False
        panels = _panels(figure, devices, share_y=False)
        for axes, device in zip(panels, devices, strict=True):
            budget, rounds = device["budget_cpu_s"], training_rounds(device["history"], report["method"])
            seconds = [entry["cpu_s"] for entry in rounds]
            over = _over(seconds, [budget] * len(seconds))
            broken |= any(over)
            colours = [COLOURS["over" if bad else "measured"] for bad in over]
            axes.bar([entry["round"] for entry in rounds], seconds, 0.72, color=colours)
            axes.axhline(budget, **_LIMIT)
            axes.axhline(device["plan"]["cpu_s"], **_FORECAST)
            axes.annotate(f"{budget:g} s", (0, budget), (4, 4), xycoords=("axes fraction", "data"), **_NOTE)
            axes.set_ylim(0, max(budget, device["plan"]["cpu_s"], *seconds) * (1 + _HEADROOM))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            _stage_two_of(axes, rounds)
        _name_axes(panels, x=f"round of {METHODS[report['method']]}", y="CPU seconds")
        _legend(
            figure,
            [
                Patch(color=COLOURS["measured"], label="measured"),
                Line2D([], [], label="predicted for the plan", **_FORECAST),
                Line2D([], [], label="budget", **_LIMIT),
                *([Patch(color=COLOURS["over"], label="over budget")] if broken else []),
            ],
        )

    texts = [f"{d['id']}: at most {max(d['cpu_s']):.1f} s of {d['budget_cpu_s']:.1f} s" for d in devices]
    return _render("cpu", "CPU seconds of every round against budget", texts, _rows(devices) * 195 + 62, draw)


def depth(report: Mapping[str, Any]) -> str:
    """Active depth by rounds, one panel a device."""
    devices = report["devices"]
    schedule: dict[int, int] = {}
    for device in devices:
        for entry in training_rounds(device["history"], report["method"]):
            schedule[entry["round"]] = max(entry["depth"], schedule.get(entry["round"], 0))

    def draw(figure: Figure) -> None:
        panels = _panels(figure, devices, share_y=True)
        for axes, device in zip(panels, devices, strict=True):
            rounds = training_rounds(device["history"], report["method"])
            numbers, depths = [entry["round"] for entry in rounds], [entry["depth"] for entry in rounds]
            _steps(axes, list(schedule), list(schedule.values()), **_SCHEDULE)
            _steps(axes, numbers, depths, color=COLOURS["measured"], fill=True, alpha=0.16, linewidth=0)
            axes.axhline(device["plan"]["depth"], zorder=2.2, **_PLAN)
            _steps(axes, numbers, depths, color=COLOURS["measured"], linewidth=2, zorder=2.4)
            axes.axhline(device["blocks_total"], **_LIMIT)
            axes.set_ylim(0, device["blocks_total"] * (1 + _HEADROOM))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            _stage_two_of(axes, rounds)
        _name_axes(panels, x=f"round of {METHODS[report['method']]}", y="active blocks")
        _legend(
            figure,
            [
                Line2D([], [], color=COLOURS["measured"], linewidth=2, label="active depth"),
                Line2D([], [], label="depth of the plan", **_PLAN),
                Line2D([], [], label="deepest device (schedule)", **_SCHEDULE),
                Line2D([], [], label="all blocks", **_LIMIT),
            ],
        )

    texts = [f"{d['id']}: {', '.join(map(str, d['blocks_active']))} of {d['blocks_total']} blocks" for d in devices]
    return _render("depth", "Active depth by rounds", texts, _rows(devices) * 195 + 62, draw)


def _over(values: Sequence[float], budgets: Sequence[float]) -> list[bool]:
    return [value > budget for value, budget in zip(values, budgets, strict=True)]


def _steps(axes: Axes, rounds: Sequence[int], values: Sequence[float], **style: Any) -> None:
    edges = [number - 0.5 for number in rounds] + [rounds[-1] + 0.5]
    axes.stairs(values, edges, baseline=0 if style.get("fill") else None, **style)


def _stage_two_of(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xlim(rounds[0]["round"] - 0.7, rounds[-1]["round"] + 0.7)
    personal = [entry["round"] for entry in rounds if entry["stage"] == "personal"]
    if personal:
        _stage_two(axes, personal[0] - 0.5, personal[-1] + 0.5)


def _stage_two(axes: Axes, start: float, end: float) -> None:
    axes.axvspan(start, end, color=COLOURS["muted"], alpha=0.11, linewidth=0, zorder=0)
    axes.annotate(
        "stage 2",
        ((start + end) / 2, 1),
        (0, -3),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        **_NOTE,
    )


def _rows(devices: Sequence[Device]) -> int:
    return -(-len(devices) // _COLUMNS)


def _panels(figure: Figure, devices: Sequence[Device], *, share_y: bool) -> list[Axes]:
    columns = min(len(devices), _COLUMNS)
    grid = figure.subplots(_rows(devices), columns, sharey=share_y, squeeze=False).flat
    panels = list(grid)
    for spare in panels[len(devices) :]:
        spare.remove()
    for axes, device in zip(panels, devices, strict=False):
        axes.set_title(_short(device["id"], 24), loc="left", pad=21, weight="bold")
        axes.annotate(_short(device["profile"], 30), (0, 1), (0, 7), xycoords="axes fraction", **_NOTE)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return panels[: len(devices)]


def _name_axes(panels: Sequence[Axes], *, x: str, y: str) -> None:
    first_column = panels[::_COLUMNS]
    for axes in first_column:
        axes.set_ylabel(y)
    first_column[-1].set_xlabel(x, loc="left")


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=2.2, columnspacing=1.5)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _render(name: str, title: str, texts: Sequence[str], height: float, draw: Callable[[Figure], None]) -> str:
    """An ``<svg>`` element; ``name`` keeps its ids apart from those of the page's other plots."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH / _POINTS, height / _POINTS), layout="constrained")
        draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(data.getvalue())  # noqa: S314 (written one line above)
    root.attrib = {"xmlns": _SVG, "viewBox": root.attrib["viewBox"], "role": "img"}
    root.attrib |= {"aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-desc"}
    for element in root.iter():
        _adapt(element, name)
    for tag, text in (("desc", ". ".join(texts)), ("title", title)):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str) -> None:
    """Fit matplotlib's element into a page: no styles that leak out, the page's font and colours."""
    element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    for child in [child for child in element if child.tag.endswith("}style")]:
        element.remove(child)
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.get('id')}")
    if _HREF in element.attrib:
        element.set("href", element.attrib.pop(_HREF).replace("#", f"#{name}-"))
    if "clip-path" in element.attrib:
        element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))
    if "style" in element.attrib:
        style = re.sub(r"font-family: [^;]*;? ?", "", element.attrib["style"])
        for colour, value in COLOURS.items():
            style = style.replace(value, f"var(--plot-{colour}, {value})")
        element.set("style", style)
