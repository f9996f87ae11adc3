"""A header that the server trains on what clients' representations are like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from fleetune.tools.experiment.base import Cost, Federation, Hyper
from fleetune.tools.experiment.baselines.base import (
    SHARED,
    Baseline,
    ClassMeans,
    classification_loss,
    initial,
    require_equal_widths,
    size_of,
)
from fleetune.tools.pack.extractors import Cnn


class FedGH(Baseline):
    """A generalised global header (Yi et al., 2023).

    A client replaces its header by the newest global one, trains its whole model, and sends the mean representation of
    each class that it has. The server takes one step of gradient descent for each of these, client by client, with its
    class as the label. What is left open, or differs:

    * The server's step is as large as the clients'.
    * A client answers with the model that it has trained, as in the authors' code; the global header, which has seen no
      sample of its, replaces that model's when the client trains again.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.

    Raises:
        ConfigError: Representations differ in width.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        require_equal_widths("FedGH", models)
        super().__init__(federation, models, hyper)
        self.header = initial(models[0], federation.classes, hyper.seed, SHARED).header
        """The global one."""

    def _played(self, sampled: Sequence[int]) -> Cost:
        flops, found = 0.0, []
        for client in sampled:
            model = self.models[client]
            model.header.load_state_dict(self.header.state_dict())
            trained = self._train(client, [model], classification_loss(model))
            means, looked = self._class_means(client)
            flops += trained + looked
            found.append(means)
        for means in found:
            self._learn(means)
        sent = len(sampled) * size_of(self.header.state_dict()) + sum(means.numel() for _, means, _ in found)
        return Cost(sent, flops)

    def _learn(self, found: ClassMeans) -> None:
        """The server's steps for one client."""
        optimiser = torch.optim.SGD(self.header.parameters(), lr=self._hyper.learning_rate)
        for label, mean in zip(found.labels, found.means, strict=True):
            optimiser.zero_grad()
            functional.cross_entropy(self.header(mean), label).backward()
            optimiser.step()
