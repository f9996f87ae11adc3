"""Weighted means that can be built piece by piece, in any order and in several places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class PartialSum:
    """For each tensor, a weighted sum and the sum of its weights.

    Every tensor has its own weight, so a block is averaged over exactly the devices that trained it, and a tensor
    that nobody sent is absent from the mean. Sums are float64, so the order of the devices does not show.
    """

    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, NDArray[np.float32]], weight: float, *, scale: float = 1.0) -> None:
        """Add one device's tensors.

        Args:
            tensors: Full name → tensor.
            weight: What they count in the mean.
            scale: What they are multiplied by; the weight stays, so that the mean becomes smaller too.
        """
        for name, tensor in tensors.items():
            self._add(name, tensor.astype(np.float64) * (weight * scale), weight)

    def merge(self, other: PartialSum) -> None:
        """Add another partial sum."""
        for name, total in other.sums.items():
            self._add(name, total, other.weights[name])

    def _add(self, name: str, total: NDArray[np.float64], weight: float) -> None:
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def mean(self) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of every tensor that has one."""
        return {
            name: (total / self.weights[name]).astype(np.float32)
            for name, total in self.sums.items()
            if self.weights[name] > 0
        }
