"""A round that ran short of memory: what it had learned by then, so that nothing is lost if it is killed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fleetune.edge.engine.parameters import FloatArray
from fleetune.edge.methods.base import TensorStore

_NAME, _PLACE = "unfinished", "place"


class Trained(Protocol):
    """What a round trains."""

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """Full name → tensor."""
        ...

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite it."""
        ...


class Unfinished:
    """Keeps what is trained in a round that may not live to its end.

    Args:
        store: Where it is kept.
        number: The round's.
    """

    def __init__(self, store: TensorStore, number: int) -> None:
        self._store, self._number = store, number

    def save(self, trained: Trained, steps: int) -> None:
        """Keep it as it is after some steps."""
        self._store.save(_NAME, {**trained.tensors, _PLACE: np.array([self._number, steps])})

    def load(self, trained: Trained) -> int:
        """Give it what was kept of this round; returns the steps that are in it, 0 if nothing was kept."""
        kept = self._store.load(_NAME)
        if kept is None:
            return 0
        place = kept.pop(_PLACE, np.empty(0))
        number, steps = (int(value) for value in place) if place.shape == (2,) and place.dtype == np.int64 else (-1, 0)
        if number != self._number or steps < 0:
            return 0
        trained.load(kept)
        return steps
