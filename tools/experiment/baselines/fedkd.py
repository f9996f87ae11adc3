"""A small student that all share and a private teacher, who trust each other as far as both are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Federation, Hyper
from fleetune.tools.experiment.baselines.base import Classifier, require_equal_widths
from fleetune.tools.experiment.baselines.mutual import MutualLearning, divergence
from fleetune.tools.pack.extractors import SHARED_CNN, Cnn


@dataclass(frozen=True)
class FedKDSettings:
    """What FedKD has besides.

    Attributes:
        small: The body of the student.
        floor: The least that task losses count where something is divided by them. The paper has none, but two models
            that are sure and right have no loss at all.
    """

    small: Cnn = SHARED_CNN
    floor: float = 0.01


DEFAULTS = FedKDSettings()


class FedKD(MutualLearning):
    """Adaptive mutual distillation (Wu et al., 2022).

    Teacher and student are trained by ``CE + (KL + MSE) / (CE_teacher + CE_student)`` each: by labels, by each other's
    answers and by each other's hidden states, the more strongly the more right both are. What is left open, or differs:

    * Hidden states are representations. They are equally wide, so no matrix has to fit one to the other; the attention
      maps that the paper compares besides do not exist in a CNN.
    * A loss moves one model: no gradient goes through the other's answers, nor through the intensity.
    * The teacher answers: it is the client's own.
    * The student's updates are sent whole. The paper compresses them by a truncated singular value decomposition, which
      Fleetune's own methods have no counterpart of, so what is sent compares distillation alone.

    Args:
        federation: The clients.
        models: The body of each client, its teacher.
        hyper: Hyper-parameters.
        settings: Of this method.

    Raises:
        ConfigError: Representations differ in width.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, settings: FedKDSettings = DEFAULTS
    ) -> None:
        require_equal_widths("FedKD", [*models, settings.small])
        super().__init__(federation, models, hyper, settings.small)
        self._floor = settings.floor

    def loss(self, own: Classifier, copy: Classifier, pictures: Tensor, labels: Tensor) -> Tensor:
        """The losses of both."""
        hidden = own.body(pictures), copy.body(pictures)
        teacher, student = own.header(hidden[0]), copy.header(hidden[1])
        tasks = functional.cross_entropy(teacher, labels) + functional.cross_entropy(student, labels)
        answers = divergence(teacher, student) + divergence(student, teacher)
        states = functional.mse_loss(hidden[0], hidden[1].detach()) + functional.mse_loss(hidden[1], hidden[0].detach())
        return tasks + (answers + states) / tasks.detach().clamp(min=self._floor)
