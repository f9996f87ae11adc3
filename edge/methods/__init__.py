"""What one device does in one round, for each method. A new method is a folder and one line in :data:`METHODS`."""

from __future__ import annotations

from fleetune.edge.methods.base import Method
from fleetune.edge.methods.baselines.frozen_head import FrozenHead
from fleetune.edge.methods.baselines.standalone import Standalone
from fleetune.edge.methods.fedms.method import FedMS
from fleetune.edge.methods.pfedmoe.method import PFedMoE

METHODS: dict[str, type[Method]] = {
    "fedms": FedMS,
    "pfedmoe": PFedMoE,
    "frozen-head": FrozenHead,
    "standalone": Standalone,
}
