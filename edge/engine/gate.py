"""The gate of a Mixture of Foundation Models: how much each expert counts, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.loss import cross_entropy, softmax
from fleetune.edge.engine.parameters import fitting

FloatArray = NDArray[np.float32]

ADAPTER = ("gate.A", "gate.B")
"""The shared part, which joins the aggregation."""

HEAD = ("gate.weight", "gate.bias")
"""The private part."""

EPSILON = 1e-6
"""Added to the standard deviation of a gate's input."""


def adapter_shapes(width: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Full name → shape of the shared part."""
    return dict(zip(ADAPTER, ((width, rank), (rank, width)), strict=True))


class Gate:
    """``softmax((x + (x A) B) W + b)`` over the global and the local expert.

    ``x`` is the normalised mean of the hidden states at the boundary: cached already, and of the same level on every
    device of a job. A [d, r] and B [r, d] form the gate adapter, W [d, 2] and b [2] the private head. With B, W and b
    zero, a fresh gate weighs both experts equally.

    Args:
        width: d.
        rank: r.
        seed: Seed of A, the same on all devices of a job.
    """

    def __init__(self, width: int, rank: int, seed: int) -> None:
        bound, shapes = 1 / np.sqrt(width), adapter_shapes(width, rank)
        initial = np.random.default_rng(seed).uniform(-bound, bound, shapes["gate.A"]).astype(np.float32)
        self.tensors: dict[str, FloatArray] = {
            "gate.A": initial,
            "gate.B": np.zeros(shapes["gate.B"], dtype=np.float32),
            "gate.weight": np.zeros((width, 2), dtype=np.float32),
            "gate.bias": np.zeros(2, dtype=np.float32),
        }

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite the named tensors.

        Raises:
            DataError: A name is unknown or a shape differs.
        """
        for target, array in self._fitting(tensors):
            target[...] = array

    def add(self, differences: Mapping[str, FloatArray]) -> None:
        """Add to the adapter, as far as it is named.

        Raises:
            DataError: A shape differs.
        """
        for target, array in self._fitting({name: differences[name] for name in ADAPTER if name in differences}):
            target += array

    def _fitting(self, tensors: Mapping[str, FloatArray]) -> Iterator[tuple[FloatArray, FloatArray]]:
        remedy = "check that both sides use the same pack and the same rank of the gate"
        return fitting("the gate", self.tensors, tensors, remedy)

    def weights(self, pooled: FloatArray) -> FloatArray:
        """Weights [n, 2] of the global and the local expert; each row sums to 1."""
        return self._forward(_normalise(pooled))[2]

    def _forward(self, x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        t = self.tensors
        low: FloatArray = x @ t["gate.A"]
        z: FloatArray = x + low @ t["gate.B"]
        return low, z, softmax(z @ t["gate.weight"] + t["gate.bias"])

    def gradients(
        self,
        pooled: FloatArray,
        experts: FloatArray,
        labels: NDArray[np.int64],
        head: tuple[FloatArray, FloatArray] | None,
    ) -> tuple[float, dict[str, FloatArray]]:
        """Loss of the mixture and its gradients with respect to the gate.

        Args:
            pooled: Gate input [n, d].
            experts: What is mixed: logits [n, 2, classes], or features [n, 2, d] if ``head`` is given.
            labels: Classes [n].
            head: Weight [d, classes] and bias of the head that classifies mixed features.

        Returns:
            Mean cross-entropy, and tensor name → gradient.
        """
        x = _normalise(pooled)
        low, z, weights = self._forward(x)
        mixed = mix(weights, experts)
        loss, slope = cross_entropy(mixed if head is None else mixed @ head[0] + head[1], labels)
        slope /= len(labels)
        if head is not None:
            slope = slope @ head[0].T
        toward = np.einsum("nc,nkc->nk", slope, experts)
        g = weights * (toward - (weights * toward).sum(axis=1, keepdims=True))
        t = self.tensors
        back = g @ t["gate.weight"].T
        return loss / len(labels), {
            "gate.A": x.T @ (back @ t["gate.B"].T),
            "gate.B": low.T @ back,
            "gate.weight": z.T @ g,
            "gate.bias": g.sum(axis=0),
        }


def mix(weights: FloatArray, experts: FloatArray) -> FloatArray:
    """``Σ_k α_k e_k`` for weights [n, 2] and experts [n, 2, m]."""
    mixed: FloatArray = np.einsum("nk,nkm->nm", weights, experts)
    return mixed


def _normalise(pooled: FloatArray) -> FloatArray:
    """Zero mean and unit variance for each sample."""
    centred = pooled - pooled.mean(axis=1, keepdims=True)
    normal: FloatArray = centred / (centred.std(axis=1, keepdims=True) + EPSILON)
    return normal
