"""pFedMoE: the shared extractor goes down and up in every round; all else stays on the devices."""

from __future__ import annotations

from fleetune.server.strategies.base import OneStage


class PFedMoE(OneStage):
    """Rounds in which devices train their mixtures, and send the extractor."""

    shared = ("extractor.",)
