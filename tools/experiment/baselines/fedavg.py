"""One model for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fleetune.tools.experiment.base import Federation, Hyper
from fleetune.tools.experiment.baselines.averaging import PartAveraging
from fleetune.tools.experiment.baselines.base import Classifier, require_equal_models
from fleetune.tools.pack.extractors import Cnn


class FedAvg(PartAveraging):
    """The whole model is the mean over the round's clients, by their samples (McMahan et al., 2017, algorithm 1).

    Raises:
        ConfigError: Models differ.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        require_equal_models("FedAvg", federation, models)
        super().__init__(federation, models, hyper)

    @staticmethod
    def part(model: Classifier) -> nn.Module:
        """All of it."""
        return model
