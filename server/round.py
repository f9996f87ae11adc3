"""The round that is open: who has answered, what it adds up to, and when it closes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.messages import Announcement
from fleetune.server.journal import Accepted, Typical
from fleetune.server.privacy import SUMS, RoundPrivacy, Shares
from fleetune.server.rules import RULES
from fleetune.server.rules.base import Bounds, Load, Rule, Sizes, staleness_weight
from fleetune.server.strategies.base import Metrics, NextRound


@dataclass
class OpenRound:
    """The round that is open. A rule makes one of what has come; updates themselves stay on disk.

    Attributes:
        announcement: As it was announced.
        plan: What the strategy asked for.
        bounds: How far one update may go.
        load: Reads an update of the round from the journal.
        answers: Device → its figures, of those that answered this round.
        late: Updates of earlier rounds that it took in.
        deadline: When a quorum is enough, by the monotonic clock.
        closing: Whether what it gained is in the global tensors; nothing more is taken then.
    """

    announcement: Announcement
    plan: NextRound
    bounds: Bounds
    load: Load
    answers: dict[str, Metrics] = field(default_factory=dict)
    late: int = 0
    deadline: float = math.inf
    closing: bool = False
    rule: Rule = field(init=False)
    _sizes: Sizes = field(default_factory=Sizes)
    _shares: Shares = field(default_factory=Shares)

    def __post_init__(self) -> None:
        self.rule = RULES[self.bounds.settings.name](self.bounds, self.load)

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Take an update that is in the journal."""
        manifest = accepted.manifest
        if manifest.version == self.announcement.version:
            self.answers[manifest.device] = manifest.metrics
        else:
            self.late += 1
        if tensors:
            self._sizes.add(accepted)
            self.rule.add(accepted, tensors)
            if self.announcement.privacy is not None:
                self._shares.add(manifest.device, tensors, staleness_weight(accepted.staleness))

    @property
    def updates(self) -> int:
        """Updates so far, answers and late ones."""
        return len(self.answers) + self.late

    @property
    def limit(self) -> float:
        """Norm above which an update is refused."""
        return self.bounds.limit(self._sizes)

    @property
    def typical(self) -> Typical | None:
        """What is typical of the updates so far."""
        return self._sizes.typical

    @property
    def privacy(self) -> RoundPrivacy | None:
        """What the updates so far hide behind, if they are private."""
        return self._shares.close(is_sum=self.bounds.settings.name in SUMS)

    def gain(self) -> Tensors:
        """What the round adds to each global tensor: what the rule makes of those who trained it."""
        return self.rule.gain()

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
