"""Says when it is too hot to train: a board that throttles takes longer for the same round, and gets no cooler."""

from __future__ import annotations

from pathlib import Path

from fleetune.edge.resources.probes.thermal import Thermal, Zone, read_thermal
from fleetune.edge.resources.probes.tree import Tree

COOLER_C = 5.0
"""Degrees below its limit to which a board that throttled has to cool down: at one degree it would be back at once."""


class Heat:
    """Heat of this board.

    Args:
        root: Where its `/sys` is.
        throttles_c: Degrees from which it throttles, where no zone has a trip point that says so.
    """

    def __init__(self, root: Path = Path("/"), throttles_c: float | None = None) -> None:
        self._tree, self._throttles_c = Tree(root), throttles_c
        self._hot = False

    def reason(self) -> str:
        """Why training has to wait; empty if it has not to, or nothing here measures heat."""
        thermal = read_thermal(self._tree)
        zone, limit = self._closest(thermal)
        margin = None if zone is None or zone.temperature_c is None else limit - zone.temperature_c
        throttles = bool(thermal.throttling) or (margin is not None and margin <= 0)
        self._hot = throttles or (self._hot and margin is not None and margin < COOLER_C)
        if not self._hot:
            return ""
        if zone is None or zone.temperature_c is None:
            return "the board throttles"
        name, now = zone.kind or zone.name, zone.temperature_c
        return f"{name} is at {now:.0f} °C and throttles from {limit:.0f}; goes on at {limit - COOLER_C:.0f}"

    def _closest(self, thermal: Thermal) -> tuple[Zone | None, float]:
        """The zone that is closest to its limit, and the limit."""
        margin = thermal.margin_c
        for zone in thermal.zones:
            if margin is not None and zone.margin_c == margin and zone.temperature_c is not None:
                return zone, zone.temperature_c + margin
        warm = [zone for zone in thermal.zones if zone.temperature_c is not None]
        if self._throttles_c is None or not warm:
            return None, 0.0
        return max(warm, key=lambda zone: zone.temperature_c or 0.0), self._throttles_c
