"""Says when it is too hot to train: a board that throttles takes longer for the same round, and gets no cooler."""

from __future__ import annotations

from pathlib import Path

from fleetune.edge.resources.probes.thermal import read_thermal
from fleetune.edge.resources.probes.tree import Tree

COOLER_C = 5.0
"""Degrees below its limit to which a board that throttled has to cool down: at one degree it would be back at once."""


class Heat:
    """Heat of this board.

    Args:
        root: Where its `/sys` is.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._tree = Tree(root)
        self._hot = False

    def reason(self) -> str:
        """Why training has to wait; empty if it has not to, or nothing here measures heat."""
        thermal = read_thermal(self._tree)
        margin = thermal.margin_c
        self._hot = bool(thermal.throttling) or (self._hot and margin is not None and margin < COOLER_C)
        if not self._hot:
            return ""
        warmest = next((zone for zone in thermal.zones if zone.margin_c == margin), None)
        if warmest is None or warmest.temperature_c is None or margin is None:
            return "the board throttles"
        now, limit = warmest.temperature_c, warmest.temperature_c + margin
        name = warmest.kind or warmest.name
        return f"{name} is at {now:.0f} °C and throttles from {limit:.0f}; goes on at {limit - COOLER_C:.0f}"
