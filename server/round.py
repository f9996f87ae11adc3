"""The round that is open: who has answered, what it adds up to, and when it closes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.messages import Announcement
from fleetune.server.aggregate import PartialSum
from fleetune.server.journal import Accepted
from fleetune.server.strategies.base import Metrics, NextRound


def staleness_weight(rounds: int) -> float:
    """What an update counts that answers a round τ rounds ago: (1 + τ)^(−1/2), as in FedBuff (Nguyen et al., 2022)."""
    return 1 / math.sqrt(1 + rounds)


@dataclass
class OpenRound:
    """The round that is open. What has come is summed up at once; updates themselves stay on disk.

    Attributes:
        announcement: As it was announced.
        plan: What the strategy asked for.
        answers: Device → its figures, of those that answered this round.
        late: Updates of earlier rounds that it took in.
        deadline: When a quorum is enough, by the monotonic clock.
        closing: Whether what it gained is in the global tensors; nothing more is taken then.
    """

    announcement: Announcement
    plan: NextRound
    answers: dict[str, Metrics] = field(default_factory=dict)
    late: int = 0
    deadline: float = math.inf
    closing: bool = False
    _sum: PartialSum = field(default_factory=PartialSum)

    def add(self, accepted: Accepted, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Take an update that is in the journal."""
        manifest = accepted.manifest
        if manifest.version == self.announcement.version:
            self.answers[manifest.device] = manifest.metrics
        else:
            self.late += 1
        self._sum.add(tensors, manifest.samples, scale=staleness_weight(accepted.staleness))

    @property
    def updates(self) -> int:
        """Updates so far, answers and late ones."""
        return len(self.answers) + self.late

    def gain(self) -> dict[str, NDArray[np.float32]]:
        """What the round adds to each global tensor: the weighted mean over those who trained it."""
        return self._sum.mean()

    def means(self) -> dict[str, float]:
        """Mean of every figure over the devices that reported it as a finite number."""
        return _means(self.answers.values())


def _means(answers: Iterable[Metrics]) -> dict[str, float]:
    values = dict[str, list[float]]()
    for metrics in answers:
        for name, value in metrics.items():
            if isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: fmean(found) for name, found in sorted(values.items())}
