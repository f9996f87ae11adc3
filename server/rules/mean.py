"""The mean, weighted by samples, of updates whose norms are clipped: the default.

Clipping bounds what one device can do in a round (Sun et al., 2019, "Can you really backdoor federated learning?"); it
does not outvote many. The sum is a stream and a mergeable partial sum: the bounds are known before the first update of
a round. Only the first round of a stage is summed at its closing, from the journal.

Memory: one sum, and one update at a time; in the first round of a stage also the records of its updates.
"""

from __future__ import annotations

from fleetune.edge.protocol.codec import Tensors
from fleetune.server.aggregate import PartialSum
from fleetune.server.journal import Accepted
from fleetune.server.rules.base import Bounds, Load


class Mean:
    """A :class:`~fleetune.server.rules.base.Rule`.

    Args:
        bounds: How far one update may go.
        load: Reads an update once more.
    """

    def __init__(self, bounds: Bounds, load: Load) -> None:
        self._bounds, self._load = bounds, load
        self._waiting: list[Accepted] = []
        self._sum = PartialSum()

    @staticmethod
    def tolerates(updates: int) -> int:
        """None are outvoted; each is bounded."""
        del updates
        return 0

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Sum up an update, or keep in mind that there is one."""
        if self._bounds.typical is None:
            self._waiting.append(accepted)
        else:
            self._add(self._bounds, accepted, tensors)

    def gain(self) -> Tensors:
        """The mean of every tensor over those who sent it."""
        if self._waiting:
            bounds = self._bounds.at_closing(self._waiting)
            for accepted in self._waiting:
                self._add(bounds, accepted, self._load(accepted))
            self._waiting.clear()
        return self._sum.mean()

    def _add(self, bounds: Bounds, accepted: Accepted, tensors: Tensors) -> None:
        self._sum.add(tensors, bounds.weight(accepted), scale=bounds.scale(accepted))
