"""Every client for itself."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.tools.experiment.base import Cost
from fleetune.tools.experiment.baselines.base import Baseline, classification_loss


class Standalone(Baseline):
    """Clients train their own models on their own samples and send nothing: what federation has to beat."""

    def _played(self, sampled: Sequence[int]) -> Cost:
        trained = [(client, self.models[client]) for client in sampled]
        return Cost(0, sum(self._train(client, [model], classification_loss(model)) for client, model in trained))
