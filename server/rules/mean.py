"""The mean, weighted by samples, of updates whose norms are clipped: the default.

Clipping bounds what one device can do in a round (Sun et al., 2019, "Can you really backdoor federated learning?"); it
does not outvote many. The sum is a stream and a mergeable partial sum: the bounds are known before the first update of
a round. Where they turn out to say nothing, it is summed once more at its closing, from the journal: in the first round
of a stage, and in one in which more than half of the updates were clipped.

Memory: one sum, one update at a time, and the records of the round's updates.
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
        self._updates: list[Accepted] = []
        self._sum = PartialSum()

    @staticmethod
    def tolerates(updates: int) -> int:
        """None are outvoted; each is bounded."""
        del updates
        return 0

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Sum up an update, if there are bounds."""
        self._updates.append(accepted)
        if self._bounds.typical is not None:
            self._add(accepted, tensors)

    def gain(self) -> Tensors:
        """The mean of every tensor over those who sent it."""
        bounds = self._bounds.at_closing(self._updates)
        if bounds is not self._bounds:
            self._bounds, self._sum = bounds, PartialSum()
            for accepted in self._updates:
                self._add(accepted, self._load(accepted))
        return self._sum.mean()

    def _add(self, accepted: Accepted, tensors: Tensors) -> None:
        self._sum.add(tensors, self._bounds.weight(accepted), scale=self._bounds.scale(accepted))
