"""Baselines: devices train alone, and nothing is broadcast or aggregated."""

from __future__ import annotations

from fleetune.server.strategies.base import OneStage


class Standalone(OneStage):
    """Private training, under the same schedule as a federation."""


class FrozenHead(OneStage):
    """One round: a head on the frozen backbone."""
