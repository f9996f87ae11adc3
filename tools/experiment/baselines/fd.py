"""What everybody answers where a class is the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import Baseline, Classifier, Loss
from fleetune.tools.pack.extractors import Cnn


@dataclass(frozen=True)
class FDSettings:
    """What FD has besides.

    Attributes:
        weight: γ, how much the others' answers count beside the labels. The paper names no value.
    """

    weight: float = 0.1


DEFAULTS = FDSettings()


class FD(Baseline):
    """Federated distillation (Jeong et al., 2018, algorithm 1), without its augmentation.

    What is exchanged are means of answers: for each class, of the softmax outputs for its samples, as they came while
    the model was trained. A client's teacher for a class is the mean of what the others answer, each of them counting
    as much as another, and cross-entropy with it joins the loss of that class's samples. What is left open, or differs:

    * γ; see :class:`FDSettings`.
    * The paper has every client in every round, with samples of every class. Here the mean is over the others who sent
      the class in the last round in which anybody did; where there is none, labels alone count.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.
        settings: Of this method.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, settings: FDSettings = DEFAULTS
    ) -> None:
        super().__init__(federation, models, hyper)
        self._settings = settings
        clients, classes = len(models), federation.classes
        self._answered = torch.zeros(clients, classes, classes)
        self._has = torch.zeros(clients, classes, dtype=torch.bool)

    def teacher(self, client: int) -> tuple[Tensor, Tensor]:
        """What others answer for each class [classes, classes], and whether anybody does [classes]; zeros where not."""
        others = self._has.clone()
        others[client] = False
        number = others.sum(0)
        mean = (self._answered * others[:, :, None]).sum(0) / number.clamp(min=1)[:, None]
        return mean, number > 0

    def _played(self, sampled: Sequence[int]) -> Cost:
        classes, flops = self._federation.classes, 0.0
        sums, counts = torch.zeros(len(sampled), classes, classes), torch.zeros(len(sampled), classes)
        for client, own_sums, own_counts in zip(sampled, sums, counts, strict=True):
            model = self.models[client]
            flops += self._train(client, [model], self._loss(model, self.teacher(client)[0], own_sums, own_counts))
        self._has[:, (counts > 0).any(0)] = False
        self._has[list(sampled)] |= counts > 0
        self._answered[list(sampled)] = sums / counts.clamp(min=1)[:, :, None]
        classes_sent = int((counts > 0).sum()) + sum(int(self.teacher(client)[1].sum()) for client in sampled)
        return Cost(classes_sent * classes, flops)

    def _loss(self, model: Classifier, taught: Tensor, sums: Tensor, counts: Tensor) -> Loss:
        """By labels and by the others' answers; adds what the model answers up."""

        def loss(pictures: Tensor, labels: Tensor) -> Tensor:
            logits = model(pictures)
            sums.index_add_(0, labels, logits.detach().softmax(1))
            counts.index_add_(0, labels, torch.ones(len(labels)))
            regulariser = -(taught[labels] * logits.log_softmax(1)).sum(1)
            return functional.cross_entropy(logits, labels) + self._settings.weight * regulariser.mean()

        return loss
