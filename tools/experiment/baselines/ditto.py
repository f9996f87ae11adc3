"""One model for all, and a model for each that is held near it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import (
    SHARED,
    Baseline,
    Classifier,
    Loss,
    initial,
    require_equal_models,
    size_of,
)
from fleetune.tools.pack.extractors import Cnn


@dataclass(frozen=True)
class DittoSettings:
    """What Ditto has besides.

    Attributes:
        pull: λ, how strongly a client's own model is held near the shared one. 1 is what the paper uses where a client
            has no validation samples to choose from 0.1, 1 and 2 by, as here.
    """

    pull: float = 1.0


DEFAULTS = DittoSettings()


class Ditto(Baseline):
    """A client's own model v follows its samples and the shared model w (Li et al., 2021, algorithm 1).

    w is trained as by FedAvg, and v by ``v ← v - η(∇F(v) + λ(v - w))`` with w as the round began. Both see the same
    batches, once each an epoch. v answers.

    Args:
        federation: The clients.
        models: The body of each client, the same for all.
        hyper: Hyper-parameters.
        settings: Of this method.

    Raises:
        ConfigError: Models differ.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, settings: DittoSettings = DEFAULTS
    ) -> None:
        require_equal_models("Ditto", federation, models)
        super().__init__(federation, models, hyper)
        self._settings = settings
        self.shared = initial(models[0], federation.classes, hyper.seed, SHARED)
        """The newest model for all, w."""

    def _played(self, sampled: Sequence[int]) -> Cost:
        copies, flops = [deepcopy(self.shared) for _ in sampled], 0.0
        for client, copy in zip(sampled, copies, strict=True):
            own = self.models[client]
            flops += self._train(client, [own, copy], self._loss(own, copy))
        shared = self._mean(copies, sampled)
        self.shared.load_state_dict(shared)
        return Cost(2 * len(sampled) * size_of(shared), flops)

    def _loss(self, own: Classifier, copy: Classifier) -> Loss:
        """Both models' losses, and how far a client's own is from the shared one as the round began."""
        begun = list(self.shared.parameters())

        def loss(pictures: Tensor, labels: Tensor) -> Tensor:
            apart = zip(own.parameters(), begun, strict=True)
            distance = torch.stack([(here - there.detach()).square().sum() for here, there in apart]).sum()
            losses = [functional.cross_entropy(model(pictures), labels) for model in (own, copy)]
            return losses[0] + losses[1] + self._settings.pull / 2 * distance

        return loss
