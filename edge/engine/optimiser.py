"""Adam on a flat vector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


class Adam:
    """Adam with decoupled weight decay (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2).

    Args:
        size: Number of parameters.
        learning_rate: Step size.
        weight_decay: Decay, applied to the parameters and not to the gradient.
    """

    def __init__(
        self, size: int, learning_rate: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self._rate, self._decay, self._betas = learning_rate, weight_decay, betas
        self._first = np.zeros(size, dtype=np.float32)
        self._second = np.zeros(size, dtype=np.float32)
        self._steps = 0

    def step(self, parameters: FloatArray, gradient: FloatArray) -> None:
        """Update ``parameters`` in place."""
        self._steps += 1
        first, second = self._betas
        self._first *= first
        self._first += (1 - first) * gradient
        self._second *= second
        self._second += (1 - second) * gradient * gradient
        bias_first, bias_second = 1 - first**self._steps, 1 - second**self._steps
        update = self._first / bias_first
        update /= np.sqrt(self._second / bias_second) + 1e-8
        if self._decay:
            update += self._decay * parameters
        parameters -= self._rate * update
