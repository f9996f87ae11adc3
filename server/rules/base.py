"""What every rule is: it takes the updates of a round one by one, and says at closing what the round gained.

No rule sums up what a device sends as it is. Before any of them an update is bounded (:class:`Bounds`): its L2 norm is
clipped to a multiple of what is typical, and what it counts to a multiple of what the others claim, because nobody can
check what a device claims. What is typical are medians of the round before, so that sums stay streams. Where they say
nothing, in the first round of a stage, or where devices have come to send so much more that most would be clipped, they
are those of the round itself, taken at its closing.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.messages import Privacy
from fleetune.server.job import RuleSettings
from fleetune.server.journal import Accepted, Typical

_Size = TypeVar("_Size", float, int)
Load = Callable[[Accepted], Tensors]
"""Reads an update of the round once more, from the journal."""

_ENOUGH = 3
"""Updates from which on a median outvotes somebody."""


class Rule(Protocol):
    """The updates of one round, on their way to become one.

    A rule is told what the journal has, in its order, and its gain follows from nothing else: a restarted aggregator
    repeats it and comes to the same bytes.

    Args:
        bounds: How far one update may go.
        load: Reads an update once more.
    """

    def __init__(self, bounds: Bounds, load: Load) -> None: ...

    @staticmethod
    def tolerates(updates: int) -> int:
        """Malicious ones, at most, among so many updates of a round that the rule is made for."""
        ...

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Take an update that is in the journal.

        Args:
            accepted: Its record.
            tensors: What :data:`Load` would read.
        """
        ...

    def gain(self) -> Tensors:
        """What the round adds to each global tensor; a tensor that nobody sent is absent.

        Raises:
            OSError: An update cannot be read again.
        """
        ...


@dataclass(frozen=True)
class Bounds:
    """How far one update may go.

    Attributes:
        settings: In multiples of what is typical.
        typical: What is; None before a round of the stage is closed.
    """

    settings: RuleSettings
    typical: Typical | None = None

    @classmethod
    def of_noise(cls, settings: RuleSettings, privacy: Privacy, shapes: Iterable[tuple[int, ...]]) -> Bounds:
        """The bounds of private updates, which all are about as long as their noise.

        They follow from nothing that any device sent: a clip that did would carry something of its updates into a sum
        whose noise is not accounted for. No update with the noise that it should have reaches them.

        Args:
            settings: In multiples of what is typical.
            privacy: What was asked of the devices: the norm of an update of d values is C √(1 + z² d), or little more.
            shapes: Of the tensors of an update, at most.
        """
        values = sum(map(math.prod, shapes))
        return cls(settings, Typical(privacy.clip * math.sqrt(1 + privacy.noise**2 * values), 1))

    def at_closing(self, round_: Iterable[Accepted]) -> Bounds:
        """The bounds that hold at closing: the same, or what follows from the round itself where they say nothing.

        Fewer than half of the devices, if they are malicious, cannot bring that about.
        """
        sizes = Sizes()
        for accepted in round_:
            sizes.add(accepted)
        if self.typical is not None:
            outgrown = len(sizes) >= _ENOUGH and sizes.median > self.settings.clip * self.typical.norm
            if not outgrown:
                return self
        return Bounds(self.settings, sizes.typical)

    def weight(self, accepted: Accepted) -> float:
        """What an update counts in a mean: the samples that its device claims, up to a multiple of what is typical."""
        samples = accepted.manifest.samples
        return samples if self.typical is None else min(samples, self.settings.weight * self.typical.samples)

    def clip(self, accepted: Accepted) -> float:
        """What an update is multiplied by so that its norm is at most a multiple of what is typical."""
        if self.typical is None or accepted.norm == 0:
            return 1.0
        return min(1.0, self.settings.clip * self.typical.norm / accepted.norm)

    def scale(self, accepted: Accepted) -> float:
        """The same, and smaller the later the update comes."""
        return self.clip(accepted) * staleness_weight(accepted.staleness)

    def limit(self, sizes: Sizes) -> float:
        """Norm above which an update is refused; infinite while nothing says what is typical.

        The larger of two medians counts, so that devices that come first with nothing cannot have the others refused.

        Args:
            sizes: Of the updates that the round has accepted.
        """
        if self.typical is None:
            return math.inf
        return self.settings.outlier * max(self.typical.norm, sizes.median if len(sizes) >= _ENOUGH else 0.0)


class Sizes:
    """Norms and samples of some updates; of those alone that change something.

    Of an even number the lower of the two in the middle is the median. Of fewer than three the largest counts: two that
    train to different depths may differ twentyfold, and nothing says which of them is right.
    """

    def __init__(self) -> None:
        self._norms: list[float] = []  # sorted: the median is asked for with every update
        self._samples: list[int] = []

    def __len__(self) -> int:
        return len(self._norms)

    def add(self, accepted: Accepted) -> None:
        """Take an update."""
        if accepted.norm > 0:
            insort(self._norms, accepted.norm)
            self._samples.append(accepted.manifest.samples)

    @property
    def median(self) -> float:
        """Of the norms; there must be one."""
        return _middle(self._norms)

    @property
    def typical(self) -> Typical | None:
        """What is typical of them; None if there are none."""
        return Typical(self.median, _middle(sorted(self._samples))) if self._norms else None


def _middle(ordered: Sequence[_Size]) -> _Size:
    return ordered[(len(ordered) - 1) // 2 if len(ordered) >= _ENOUGH else -1]


def norm_of(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm over all values of an update."""
    return math.sqrt(sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values()))


def staleness_weight(rounds: int) -> float:
    """What an update counts that answers a round τ rounds ago: (1 + τ)^(−1/2), as in FedBuff (Nguyen et al., 2022)."""
    return 1 / math.sqrt(1 + rounds)


def assumed(share: float, updates: int, most: int) -> int:
    """Malicious ones among so many updates, by the share that the operator assumes; no more than the rule allows."""
    return max(0, min(math.ceil(share * updates - 1e-9), most))  # 30 % of 10 are 3, whatever binary fractions say
