"""What pFedMoE is held against, in torch. A new baseline is a file and one line in :data:`BASELINES`."""

from __future__ import annotations

from fleetune.tools.experiment.base import Algorithm
from fleetune.tools.experiment.baselines.ditto import Ditto
from fleetune.tools.experiment.baselines.fd import FD
from fleetune.tools.experiment.baselines.fedavg import FedAvg
from fleetune.tools.experiment.baselines.fedgh import FedGH
from fleetune.tools.experiment.baselines.fedkd import FedKD
from fleetune.tools.experiment.baselines.fedper import FedPer
from fleetune.tools.experiment.baselines.fedproto import FedProto
from fleetune.tools.experiment.baselines.fml import FML
from fleetune.tools.experiment.baselines.lg_fedavg import LGFedAvg
from fleetune.tools.experiment.baselines.standalone import Standalone

BASELINES: dict[str, type[Algorithm]] = {
    "standalone": Standalone,
    "lg-fedavg": LGFedAvg,
    "fml": FML,
    "fedkd": FedKD,
    "fedproto": FedProto,
    "fedgh": FedGH,
    "fd": FD,
    "fedavg": FedAvg,
    "fedper": FedPer,
    "ditto": Ditto,
}
"""In the order in which they are shown; the last three need equal models."""
