"""What each class looks like, agreed upon by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import Baseline, Classifier, ClassMeans, Loss, require_equal_widths
from fleetune.tools.pack.extractors import Cnn


@dataclass(frozen=True)
class FedProtoSettings:
    """What FedProto has besides.

    Attributes:
        weight: λ, how strongly representations are drawn to their class's prototype. The paper has 1 for networks of
            two convolutions that begin untrained, as here, and 0.1 for a pretrained ResNet.
    """

    weight: float = 1.0


DEFAULTS = FedProtoSettings()


class FedProto(Baseline):
    """Federated prototype learning (Tan et al., 2022, equations 3 to 8).

    A client trains by ``CE + λ · MSE`` between representations and the prototypes of their classes, sends the mean
    representation of each class that it has, and gets the newest prototypes of those classes. It answers by the nearest
    of these, and by its classifier before it has any. What is left open, or differs:

    * Each sample's representation is drawn to the prototype, as in the authors' code; the paper draws their mean.
    * Prototypes are means by numbers of samples. The paper divides by the number of clients once more, which would
      make them shrink. A class that nobody of a round has keeps its prototype.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.
        settings: Of this method.

    Raises:
        ConfigError: Representations differ in width.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, settings: FedProtoSettings = DEFAULTS
    ) -> None:
        require_equal_widths("FedProto", models)
        super().__init__(federation, models, hyper)
        self._settings = settings
        self.prototypes = torch.zeros(federation.classes, models[0].representation)
        """The newest prototype of each class [classes, m]."""
        self._known = torch.zeros(federation.classes, dtype=torch.bool)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def _played(self, sampled: Sequence[int]) -> Cost:
        flops, found = 0.0, []
        for client in sampled:
            model = self.models[client]
            trained = self._train(client, [model], self._loss(model))
            means, looked = self._class_means(client)
            flops += trained + looked
            found.append(means)
        self._agree(found)
        for client, (labels, _, _) in zip(sampled, found, strict=True):
            self._held[client] = labels, self.prototypes[labels]
        return Cost(2 * sum(means.numel() for _, means, _ in found), flops)

    def _answers(self, client: int, pictures: Tensor) -> Tensor:
        if client not in self._held:
            return super()._answers(client, pictures)
        labels, prototypes = self._held[client]
        return labels[torch.cdist(self.models[client].body(pictures), prototypes).argmin(1)]

    def _loss(self, model: Classifier) -> Loss:
        """By labels and by prototypes, where a class has one."""

        def loss(pictures: Tensor, labels: Tensor) -> Tensor:
            hidden = model.body(pictures)
            apart = (hidden - self.prototypes[labels]).square().mean(1) * self._known[labels]
            return functional.cross_entropy(model.header(hidden), labels) + self._settings.weight * apart.mean()

        return loss

    def _agree(self, found: Sequence[ClassMeans]) -> None:
        """Make each class's prototype of what those who have it sent."""
        sums, samples = torch.zeros_like(self.prototypes), torch.zeros(len(self.prototypes))
        for labels, means, counts in found:
            sums[labels] += means * counts[:, None]
            samples[labels] += counts
        here = samples > 0
        self.prototypes = torch.where(here[:, None], sums / samples.clamp(min=1)[:, None], self.prototypes)
        self._known |= here
