"""Rules that look at each coordinate by itself, over those who sent its tensor.

The trimmed mean and the median of Yin et al., 2018, "Byzantine-robust distributed learning". Samples do not count. A
late update is made smaller before it is compared, so that it pulls less, as in a mean. With fewer than three senders
there is nothing to outvote: then only clipping bounds what one of them does.

Memory: what :mod:`~fleetune.server.rules.closing` holds, some 128 MiB with what is computed from it, and one update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors
from fleetune.server.journal import Accepted
from fleetune.server.rules.base import Bounds, Load, assumed
from fleetune.server.rules.closing import AtClosing


class _Coordinates(ABC):
    def __init__(self, bounds: Bounds, load: Load) -> None:
        self._bounds, self._round = bounds, AtClosing(load)

    @staticmethod
    def tolerates(updates: int) -> int:
        """Fewer than half."""
        return (updates - 1) // 2

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Keep in mind that there is one."""
        self._round.add(accepted, tensors)

    def gain(self) -> Tensors:
        """One value for each coordinate."""
        found = {name: np.empty(self._round.shape(name), dtype=np.float32) for name in self._round.names}
        for window in self._round.windows(self._round.scaled(self._bounds)):
            window.values.sort(axis=1)  # whoever sent first, the sum below is the same
            count = len(window.values)
            found[window.name].reshape(-1)[window.start : window.start + count] = self._combine(window.values)
        return found

    @abstractmethod
    def _combine(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """One value [coordinates] for each coordinate of some updates [coordinates, senders], lowest first."""


class TrimmedMean(_Coordinates):
    """The mean without the largest and the smallest values, as many of each as devices are assumed to be malicious.

    A :class:`~fleetune.server.rules.base.Rule`. While there are no more of those, every value lies between two honest
    ones.
    """

    def _combine(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        senders = values.shape[1]
        cut = assumed(self._bounds.settings.malicious, senders, self.tolerates(senders))
        mean: NDArray[np.float64] = values[:, cut : senders - cut].mean(axis=1, dtype=np.float64)
        return mean


class Median(_Coordinates):
    """The value in the middle; of an even number the mean of the two there.

    A :class:`~fleetune.server.rules.base.Rule`. While fewer than half are malicious, it lies between two honest ones.
    """

    def _combine(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        senders = values.shape[1]
        middle: NDArray[np.float64] = values[:, (senders - 1) // 2 : senders // 2 + 1].mean(axis=1, dtype=np.float64)
        return middle
