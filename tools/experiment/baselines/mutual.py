"""A small model that all share and a private one that learn from each other: what FML and FedKD have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from functools import partial

from torch import Tensor
from torch.nn import functional

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import SHARED, Baseline, Classifier, initial, size_of
from fleetune.tools.pack.extractors import Cnn


class MutualLearning(Baseline):
    """Clients train a copy of the shared model beside their own; the server averages the copies. Their own answer.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.
        small: The body of the shared model.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, small: Cnn) -> None:
        super().__init__(federation, models, hyper)
        self.shared = initial(small, federation.classes, hyper.seed, SHARED)
        """The newest small model."""

    @abstractmethod
    def loss(self, own: Classifier, copy: Classifier, pictures: Tensor, labels: Tensor) -> Tensor:
        """The losses of both, each of which moves only one of them."""

    def _played(self, sampled: Sequence[int]) -> Cost:
        copies, flops = [deepcopy(self.shared) for _ in sampled], 0.0
        for client, copy in zip(sampled, copies, strict=True):
            own = self.models[client]
            flops += self._train(client, [own, copy], partial(self.loss, own, copy))
        shared = self._mean(copies, sampled)
        self.shared.load_state_dict(shared)
        return Cost(2 * len(sampled) * size_of(shared), flops)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of KL(teacher ‖ student) over the rows of two models' logits [b, classes]; it moves the student alone."""
    return functional.kl_div(
        student.log_softmax(1), teacher.detach().log_softmax(1), reduction="batchmean", log_target=True
    )
