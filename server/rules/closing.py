"""What rules share that look at all updates of a round at its closing.

They are read from the journal then, as often as it takes, and of them all no more is held at a time than
:data:`HELD` bytes of float32, whatever the fleet and the model: a window of coordinates, over those who sent them.
Nothing here counts samples: what a device claims cannot be checked, and one that lies must not count for many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors
from fleetune.server.journal import Accepted
from fleetune.server.rules.base import Bounds, Load

HELD = 96 << 20
"""Bytes of all updates together that are held at a time."""

_WINDOWS = 8
"""A window takes at most one part in so many of that: whoever needs float64 has room for it."""


@dataclass
class _Sent:
    """A tensor that is sent: its shape, and which of the updates have it, each with its column in a window."""

    shape: tuple[int, ...]
    columns: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Some coordinates of a tensor, of everybody who sent it.

    Attributes:
        name: Full name of the tensor.
        start: The first of them in the flat tensor.
        senders: Updates that have it, in the journal's order: places in :attr:`AtClosing.updates`.
        values: Float32 [coordinates, senders].
    """

    name: str
    start: int
    senders: list[int]
    values: NDArray[np.float32]


class AtClosing:
    """The updates of a round, known by their records until the round is closed.

    Args:
        load: Reads an update once more.

    Attributes:
        updates: Those that came, in the journal's order.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self.updates: list[Accepted] = []
        self._sent: dict[str, _Sent] = {}

    def add(self, accepted: Accepted, tensors: Tensors) -> None:
        """Keep in mind that there is one, and what it has."""
        for name, tensor in tensors.items():
            columns = self._sent.setdefault(name, _Sent(tensor.shape)).columns
            columns[len(self.updates)] = len(columns)
        self.updates.append(accepted)

    @property
    def names(self) -> list[str]:
        """Full names of what was sent, sorted."""
        return sorted(self._sent)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that was sent."""
        return self._sent[name].shape

    def senders(self, name: str) -> list[int]:
        """Updates that have a tensor: places in :attr:`updates`."""
        return list(self._sent[name].columns)

    def load(self, place: int) -> Tensors:
        """Read an update once more."""
        return self._load(self.updates[place])

    def windows(self, factors: list[float]) -> Iterator[Window]:
        """All coordinates of all updates, window by window.

        Args:
            factors: What each update is multiplied by.
        """
        group, size = list[tuple[str, int, int]](), 0
        for name in self.names:
            senders, values = len(self._sent[name].columns), math.prod(self.shape(name))
            at_once = max(1, HELD // 4 // _WINDOWS // senders)
            for start in range(0, values, at_once):
                count = min(at_once, values - start)
                if size + count * senders > HELD // 4:
                    yield from self._read(group, factors)
                    group, size = [], 0
                group.append((name, start, count))
                size += count * senders
        yield from self._read(group, factors)

    def _read(self, group: list[tuple[str, int, int]], factors: list[float]) -> Iterator[Window]:
        windows = [
            Window(name, start, senders, np.empty((count, len(senders)), dtype=np.float32))
            for name, start, count in group
            for senders in [self.senders(name)]
        ]
        for place in sorted({place for window in windows for place in window.senders}):
            tensors = self.load(place)
            for window in windows:
                if window.name in tensors:
                    flat = tensors[window.name].reshape(-1)[window.start : window.start + len(window.values)]
                    window.values[:, self._sent[window.name].columns[place]] = flat * np.float32(factors[place])
        yield from windows

    def clipped(self, bounds: Bounds) -> list[float]:
        """What each update is multiplied by so that its norm is bounded."""
        at_closing = bounds.at_closing(self.updates)
        return [at_closing.clip(accepted) for accepted in self.updates]

    def scaled(self, bounds: Bounds) -> list[float]:
        """The same, and less the later it comes."""
        at_closing = bounds.at_closing(self.updates)
        return [at_closing.scale(accepted) for accepted in self.updates]
