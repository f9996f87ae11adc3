"""``report.html``: what a run did, for people. One file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, StrictUndefined

from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.demo import plots

Report = Mapping[str, Any]

_BASELINES = {
    "frozen_head": ("frozen-head", "Frozen backbone + head", "each device alone trains a head and nothing else"),
    "standalone": ("standalone", "Stand-alone adapters", "each device alone trains adapters and a head"),
}
_METHODS = {
    "fedms": {
        **_BASELINES,
        "global_expert": ("global", "Global expert", "stage 1: adapters and head averaged over the fleet"),
        "local_expert": ("local", "Local expert", "stage 2: each device's own copy, trained on its own samples"),
        "mixture": ("mixture", "Mixture", "the gate weighs global and local expert for every sample"),
    },
    "pfedmoe": {
        **_BASELINES,
        "global_expert": ("global", "Shared extractor", "the header on what the fleet trains together, alone"),
        "local_expert": ("local", "Private model", "the header on the device's own backbone and adapters, alone"),
        "mixture": ("mixture", "Mixture", "the gate weighs both representations for every sample"),
    },
}
"""Method → accuracy in the report → its colour among the plots', its name, and what it is."""


def write_page(report: Report, path: Path) -> None:
    """Write the report as a page.

    Args:
        report: What `build_report` returned; the baselines may be missing from it.
        path: The HTML file.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "size": _size, "median": median}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    devices = report["devices"]
    page = template.render(
        report=report,
        devices=devices,
        rounds=_rounds(devices[0]),
        backbone=report["backbones"][0],
        method=plots.METHODS[report["method"]],
        badges=_badges(report),
        methods=_methods(report),
        ticks=_ticks(devices),
        sampling_error=_sampling_error(report),
        rows=list(_flat({name: report[name] for name in ("settings", "data", "transport")})),
        plots={name: getattr(plots, name)(report) for name in ("accuracy", "memory", "cpu", "depth")},
    )
    write_atomic(path, page.encode())


@dataclass(frozen=True)
class Badge:
    """Something that must hold.

    Attributes:
        held: Whether it does.
        text: What holds or what does not.
    """

    held: bool
    text: str


@dataclass(frozen=True)
class Method:
    """One of the compared accuracies.

    Attributes:
        key: Its name in the report.
        colour: Its name among the plots' colours.
        name: What it is called.
        meaning: What it is.
        mean: Mean over the devices.
        places: Device → where its accuracy stands on the scale, in percent of the scale's length.
        place: Where the mean stands.
        gain: How much higher the mixture is, on average over the devices that have both; None for itself.
        better: How many devices the mixture serves better.
        equal: Just as well.
        worse: Worse.
    """

    key: str
    colour: str
    name: str
    meaning: str
    mean: float
    places: Mapping[str, float]
    place: float
    gain: float | None
    better: int
    equal: int
    worse: int


def _badges(report: Report) -> list[Badge]:
    summary, devices = report["summary"], report["devices"]
    memory = [device["id"] for device in devices if device["peak_mib"] > device["budget_mib"]]
    cpu = [device["id"] for device in devices if max(device["cpu_s"]) > device["budget_cpu_s"]]
    badges = []
    for name, held, over in (
        ("Memory", summary["inside_memory_budget"], memory),
        ("CPU", summary["inside_cpu_budget"], cpu),
    ):
        if held and not over:
            badges.append(Badge(True, f"{name} budgets held"))
        else:
            badges.append(Badge(False, f"{name} budget broken: {', '.join(over) or 'see the run'}"))
    same = all(one["sha256_before"] == one["sha256_after"] for one in report["backbones"])
    return [*badges, Badge(same, "Backbone unchanged" if same else "Backbone changed")]


def _methods(report: Report) -> list[Method]:
    """The accuracies that the report has, from the least to the most trained."""
    scale = _ticks(report["devices"])
    methods = []
    for key, (colour, name, meaning) in _METHODS[report["method"]].items():
        having = [device for device in report["devices"] if key in device["accuracy"]]
        if not having:
            continue
        gains = [device["accuracy"]["mixture"] - device["accuracy"][key] for device in having]
        mean = report["summary"]["accuracy"][key]
        methods.append(
            Method(
                key=key,
                colour=colour,
                name=name,
                meaning=meaning,
                mean=mean,
                places={device["id"]: _place(device["accuracy"][key], scale) for device in having},
                place=_place(mean, scale),
                gain=None if key == "mixture" else fmean(gains),
                better=sum(gain > 0 for gain in gains),
                equal=gains.count(0),
                worse=sum(gain < 0 for gain in gains),
            )
        )
    return methods


def _ticks(devices: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tens of percent that hold every device's accuracies."""
    values = [value for device in devices for value in device["accuracy"].values()]
    low, high = min(9, int(10 * min(values))), min(10, int(10 * max(values)) + 1)
    return [tenth / 10 for tenth in range(low, high + 1)]


def _place(value: float, ticks: Sequence[float]) -> float:
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _rounds(device: Mapping[str, Any]) -> dict[str, int]:
    """Training rounds of each stage of FedMS, of pFedMoE and of the stand-alone adapters."""
    kinds = [(entry["job"], entry["stage"]) for entry in device["history"]]
    return {
        "global": kinds.count(("fedms", "global")),
        "personal": kinds.count(("fedms", "personal")),
        "pfedmoe": kinds.count(("pfedmoe", "train")),
        "standalone": kinds.count(("standalone", "train")),
    }


def _sampling_error(report: Report) -> float | None:
    """Largest standard error of a device's accuracy; None if the report does not count test samples."""
    samples: int | None = report["data"].get("test")
    if not samples:
        return None
    values: list[float] = [value for device in report["devices"] for value in device["accuracy"].values()]
    return max(sqrt(value * (1 - value) / samples) for value in values)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a tree of mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _points(gain: float) -> str:
    """Difference of two shares in percentage points, with a sign that is as wide as a plus."""
    points = round(100 * gain, 1)
    return f"{points:+.1f}".replace("-", "\u2212") if points else "0.0"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f}\u00a0MB" if count >= 1e6 else f"{count / 1e3:.0f}\u00a0kB"
