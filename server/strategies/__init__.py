"""How the aggregator leads a job through its rounds, for each method; the counterpart of ``fleetune.edge.methods``."""

from __future__ import annotations

from fleetune.server.strategies.base import Strategy
from fleetune.server.strategies.baselines import FrozenHead, Standalone
from fleetune.server.strategies.fedms import FedMS
from fleetune.server.strategies.pfedmoe import PFedMoE

STRATEGIES: dict[str, type[Strategy]] = {
    "fedms": FedMS,
    "pfedmoe": PFedMoE,
    "frozen-head": FrozenHead,
    "standalone": Standalone,
}
