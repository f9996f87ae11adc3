"""Multi-Krum: the mean of the updates that lie closest to others.

Blanchard et al., 2017, "Machine learning with adversaries": of n updates, f of them malicious, each is scored by the
sum of its squared distances to the n − f − 2 that are closest to it, and the n − f with the lowest scores are averaged;
it is made for n > 2f + 2. Samples do not count.

Devices train to different depths, so two updates may share little. A distance over what two share would let a device
hide: one that sends a poisoned block which few others have, and an honest head, would be close to all those who send
the head alone. So every block (and the head, and the gate) is a Krum of its own, among those who sent it. A tensor of
it that one leaves out counts as zeros in its distances, and not at all in the mean. Distances are those of clipped
updates; being late makes an update smaller only afterwards, and does not make it look different.

Memory: what :mod:`~fleetune.server.rules.closing` holds, some 128 MiB with what is computed from it, one
update, one sum, and 8 n² bytes for each block. Time grows with n² too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors
from fleetune.server.aggregate import PartialSum
from fleetune.server.journal import Accepted
from fleetune.server.rules.base import Bounds, Load, assumed
from fleetune.server.rules.closing import AtClosing


class MultiKrum:
    """A :class:`~fleetune.server.rules.base.Rule`.

    Args:
        bounds: How far one update may go.
        load: Reads an update once more.
    """

    def __init__(self, bounds: Bounds, load: Load) -> None:
        self._bounds, self._round = bounds, AtClosing(load)

    @staticmethod
    def tolerates(updates: int) -> int:
        """As many f as satisfy n > 2f + 2."""
        return max(0, (updates - 3) // 2)

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Keep in mind that there is one."""
        self._round.add(accepted, tensors)

    def gain(self) -> Tensors:
        """The mean of every tensor over the chosen."""
        chosen = self._choose()
        scales, total = self._round.scaled(self._bounds), PartialSum()
        for place in range(len(self._round.updates)):
            parts = {name: t for name, t in self._round.load(place).items() if place in chosen[_part(name)]}
            total.add(parts, 1.0, scale=scales[place])
        return total.mean()

    def _choose(self) -> dict[str, set[int]]:
        """Part → the updates whose tensors of it count."""
        senders: dict[str, list[int]] = {}
        for name in self._round.names:
            part = _part(name)
            senders[part] = sorted({*senders.get(part, []), *self._round.senders(name)})
        products = {part: np.zeros((len(some), len(some))) for part, some in senders.items()}
        for window in self._round.windows(self._round.clipped(self._bounds)):
            part = _part(window.name)
            rows = np.searchsorted(senders[part], window.senders)
            values = window.values.astype(np.float64)
            products[part][np.ix_(rows, rows)] += values.T @ values
        return {part: {senders[part][row] for row in self._closest(found)} for part, found in products.items()}

    def _closest(self, products: NDArray[np.float64]) -> list[int]:
        """The n − f rows with the lowest scores; of equal ones those that came first.

        Args:
            products: Inner products of the updates [n, n].
        """
        count = len(products)
        if count < 3:  # nobody is closer to one than to another
            return list(range(count))
        malicious = assumed(self._bounds.settings.malicious, count, self.tolerates(count))
        squares = np.diag(products)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
        np.fill_diagonal(distances, np.inf)
        neighbours = max(1, count - malicious - 2)
        scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
        # Matrix products may differ in their last bits from run to run, and equal updates must not change places.
        unit = max(float(np.min(scores)), float(np.max(squares)) * 1e-9, np.finfo(np.float64).tiny)
        order = np.argsort(np.round(scores / unit, 6), kind="stable")
        return [int(row) for row in order[: count - malicious]]


def _part(name: str) -> str:
    """What a tensor is a part of: ``blocks.3`` of ``blocks.3.query.A``, ``head`` of ``head.bias``."""
    levels = name.split(".")
    return ".".join(levels[: 2 if levels[0] == "blocks" else 1])
