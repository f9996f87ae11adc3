"""A part of every model that has the same values everywhere: what FedAvg, FedPer and LG-FedAvg have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import nn

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import (
    SHARED,
    Baseline,
    Classifier,
    State,
    classification_loss,
    initial,
    size_of,
)
from fleetune.tools.pack.extractors import Cnn


class PartAveraging(Baseline):
    """Clients train their whole models from the newest shared part; the server averages that part.

    A round's clients have the mean at its end, and it is with the mean that they are measured.

    Args:
        federation: The clients.
        models: The body of each client; the shared part has one shape.
        hyper: Hyper-parameters.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        super().__init__(federation, models, hyper)
        self.shared: State = self.part(initial(models[0], federation.classes, hyper.seed, SHARED)).state_dict()
        """The newest values of the shared part."""

    @staticmethod
    @abstractmethod
    def part(model: Classifier) -> nn.Module:
        """What of a model is shared."""

    def _played(self, sampled: Sequence[int]) -> Cost:
        flops = 0.0
        for client in sampled:
            model = self.models[client]
            self.part(model).load_state_dict(self.shared)
            flops += self._train(client, [model], classification_loss(model))
        parts = [self.part(self.models[client]) for client in sampled]
        self.shared = self._mean(parts, sampled)
        for part in parts:
            part.load_state_dict(self.shared)
        return Cost(2 * len(sampled) * size_of(self.shared), flops)
