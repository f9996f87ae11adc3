"""One body for all, and a header for each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fleetune.tools.experiment.base import Federation, Hyper
from fleetune.tools.experiment.baselines.averaging import PartAveraging
from fleetune.tools.experiment.baselines.base import Classifier, require_equal_models
from fleetune.tools.pack.extractors import Cnn


class FedPer(PartAveraging):
    """The body is averaged, the header stays (Arivazhagan et al., 2019, algorithms 1 and 2).

    Of the paper's numbers of personal layers we use the smallest, one: the header is what all methods here agree on.

    Raises:
        ConfigError: Models differ.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        require_equal_models("FedPer", federation, models)
        super().__init__(federation, models, hyper)

    @staticmethod
    def part(model: Classifier) -> nn.Module:
        """The body."""
        return model.body
