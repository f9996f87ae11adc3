"""A small model that all share, and a private one, as each other's teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Federation, Hyper
from fleetune.tools.experiment.baselines.base import Classifier
from fleetune.tools.experiment.baselines.mutual import MutualLearning, divergence
from fleetune.tools.pack.extractors import SHARED_CNN, Cnn


@dataclass(frozen=True)
class FMLSettings:
    """What FML has besides; α and β as the paper's authors publish them.

    Attributes:
        alpha: Share of the labels in the loss of a client's own model; the rest is the shared one's answers.
        beta: Share of the labels in the loss of the shared model; the rest is the own one's answers.
        small: The body of the shared model, which the paper calls the meme.
    """

    alpha: float = 0.5
    beta: float = 0.5
    small: Cnn = SHARED_CNN


DEFAULTS = FMLSettings()


class FML(MutualLearning):
    """Federated mutual learning (Shen et al., 2020).

    The private model is trained by ``α · CE + (1 - α) · KL(shared ‖ private)``, the shared one by
    ``β · CE + (1 - β) · KL(private ‖ shared)``, on the same batches. As in deep mutual learning, on which the paper
    builds, a teacher's answers are taken as they are: no gradient goes through them.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.
        settings: Of this method.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, settings: FMLSettings = DEFAULTS
    ) -> None:
        super().__init__(federation, models, hyper, settings.small)
        self._settings = settings

    def loss(self, own: Classifier, copy: Classifier, pictures: Tensor, labels: Tensor) -> Tensor:
        """The losses of both."""
        alpha, beta, mine, shared = self._settings.alpha, self._settings.beta, own(pictures), copy(pictures)
        of_own = alpha * functional.cross_entropy(mine, labels) + (1 - alpha) * divergence(mine, shared)
        return of_own + beta * functional.cross_entropy(shared, labels) + (1 - beta) * divergence(shared, mine)
