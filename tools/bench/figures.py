"""What a benchmark reports: figures beside a peer's, with targets."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil


@dataclass(frozen=True)
class Target:
    """What a ratio to the peer, or a value without one, must reach.

    Attributes:
        limit: The limit.
        lower: Whether less is better.
    """

    limit: float
    lower: bool

    def met(self, found: float) -> bool:
        """Whether the target is reached."""
        return found <= self.limit if self.lower else found >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.lower else '≥'} {self.limit:.3g}"


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: What was measured.
        value: Median over the repeats.
        unit: Its unit.
        spread: Lowest and highest.
        peer: What it is compared with.
        peer_value: The peer's median.
        ratio: ``value / peer_value``, or the reverse where more is better: median over pairs measured in one turn.
        target: What the ratio must reach; without a peer, the value.
        met: Whether it does.
    """

    name: str
    value: float
    unit: str
    spread: tuple[float, float]
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    target: str | None = None
    met: bool | None = None


def figure(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    peer: str | None = None,
    peer_values: Sequence[float] | None = None,
    target: Target | None = None,
) -> Figure:
    """Summarise repeats.

    Args:
        name: What was measured.
        unit: Its unit.
        values: One for each turn.
        peer: What it is compared with.
        peer_values: The peer's in the same turns: other work on the machine slows both, so ratios are taken in pairs.
        target: What is asked for. The ratio is ours to the peer's if less is asked for or nothing is, else the reverse.
    """
    value = median(values)
    peer_value = median(peer_values) if peer_values else None
    ratio = None
    if peer_values:
        lower = target is None or target.lower
        ratio = median(a / b if lower else b / a for a, b in zip(values, peer_values, strict=True))
    judged = value if peer is None else ratio
    return Figure(
        name,
        round(value, 4),
        unit,
        (round(min(values), 4), round(max(values), 4)),
        peer,
        None if peer_value is None else round(peer_value, 4),
        None if ratio is None else round(ratio, 4),
        None if target is None else str(target),
        None if target is None or judged is None else target.met(judged),
    )


@dataclass(frozen=True)
class Grid:
    """Figures side by side, where one a line would be too many.

    Attributes:
        title: What they are.
        head: Heading of each column.
        rows: Cells.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        """The grid as a table in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True)
class Document:
    """The result of one benchmark.

    Attributes:
        bench: Its name.
        figures: What was measured.
        peers: Versions of the peers' packages.
        notes: What a reader must know, such as a peer that did not run.
        grids: The same figures for people; printed in their place where there are some.
    """

    bench: str
    figures: tuple[Figure, ...]
    peers: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The document as JSON."""
        return {
            "bench": self.bench,
            "environment": {**environment(), "peers": dict(self.peers)},
            "figures": [asdict(item) for item in self.figures],
            "notes": list(self.notes),
        }


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "load": round(psutil.getloadavg()[0], 2),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "fleetune": version("fleetune"),
        "onnxruntime": version("onnxruntime"),
        "numpy": version("numpy"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "cpu part")))
    return next(named, platform.processor() or "unknown")
