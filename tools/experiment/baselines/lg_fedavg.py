"""A body for each, and one header for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fleetune.tools.experiment.base import Federation, Hyper
from fleetune.tools.experiment.baselines.averaging import PartAveraging
from fleetune.tools.experiment.baselines.base import Classifier, require_equal_widths
from fleetune.tools.pack.extractors import Cnn


class LGFedAvg(PartAveraging):
    """Bodies stay, and the header is averaged (Liang et al., 2020, algorithm 1).

    The paper leaves open how many of the upper layers are global. Where bodies differ, the header is the one layer that
    always has one shape; where they are equal it is still the header alone, so that the two can be compared. The paper
    begins with a model that FedAvg has trained; here it begins with the initial values that all methods begin with.

    Raises:
        ConfigError: Representations differ in width.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        require_equal_widths("LG-FedAvg", models)
        super().__init__(federation, models, hyper)

    @staticmethod
    def part(model: Classifier) -> nn.Module:
        """The header."""
        return model.header
