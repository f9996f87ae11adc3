"""Optimisers on a flat vector; a step allocates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
OptimiserName = Literal["adam", "sgd"]


class Optimiser(Protocol):
    """Takes one step after the other."""

    def step(self, parameters: FloatArray, gradient: FloatArray) -> None:
        """Update ``parameters`` in place."""
        ...

    def narrow(self, size: int) -> None:
        """Go on with the last ``size`` parameters only."""
        ...


class Adam:
    """Adam with decoupled weight decay (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2).

    Args:
        size: Number of parameters.
        learning_rate: Step size.
        weight_decay: Decay, applied to the parameters and not to the gradient.
        betas: Decay of the first and of the second moment.
    """

    def __init__(
        self, size: int, learning_rate: float, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self._rate, self._decay, self._betas = learning_rate, weight_decay, betas
        self._first, self._second, self._update, self._root = np.zeros((4, size), dtype=np.float32)
        self._steps = 0

    def step(self, parameters: FloatArray, gradient: FloatArray) -> None:
        """Update ``parameters`` in place."""
        self._steps += 1
        first, second = self._betas
        update, root = self._update, self._root
        np.multiply(gradient, 1 - first, out=update)
        self._first *= first
        self._first += update
        np.multiply(gradient, gradient, out=update)
        update *= 1 - second
        self._second *= second
        self._second += update
        np.divide(self._second, 1 - second**self._steps, out=root)
        np.sqrt(root, out=root)
        root += 1e-8
        np.divide(self._first, 1 - first**self._steps, out=update)
        update /= root
        if self._decay:
            np.multiply(parameters, self._decay, out=root)
            update += root
        update *= self._rate
        parameters -= update

    def narrow(self, size: int) -> None:
        """Go on with the last ``size`` parameters only."""
        vectors = self._first, self._second, self._update, self._root
        self._first, self._second, self._update, self._root = (vector[-size:] for vector in vectors)


class Sgd:
    """Stochastic gradient descent with momentum and decoupled weight decay (Loshchilov and Hutter 2019, algorithm 1).

    Half of Adam's state; without momentum a quarter.

    Args:
        size: Number of parameters.
        learning_rate: Step size.
        weight_decay: Decay, applied to the parameters and not to the gradient.
        momentum: Share of the last update that goes on.
    """

    def __init__(self, size: int, learning_rate: float, *, weight_decay: float = 0.0, momentum: float = 0.9) -> None:
        self._rate, self._decay, self._momentum = learning_rate, weight_decay, momentum
        self._velocity = np.zeros(size if momentum else 0, dtype=np.float32)
        self._update = np.zeros(size, dtype=np.float32)

    def step(self, parameters: FloatArray, gradient: FloatArray) -> None:
        """Update ``parameters`` in place."""
        if self._momentum:
            self._velocity *= self._momentum
            self._velocity += gradient
            gradient = self._velocity
        np.multiply(gradient, self._rate, out=self._update)
        if self._decay:
            parameters *= 1 - self._rate * self._decay
        parameters -= self._update

    def narrow(self, size: int) -> None:
        """Go on with the last ``size`` parameters only."""
        self._velocity, self._update = self._velocity[-size:], self._update[-size:]


OPTIMISERS: dict[OptimiserName, Callable[..., Optimiser]] = {"adam": Adam, "sgd": Sgd}
"""Name in a job's settings → optimiser of ``(size, learning_rate, *, weight_decay)``."""
