"""One device's mixture: ``R = α_G G(x; θ) + α_F F(x; ω)`` through a private header, and how a batch trains it.

Fleets and the paper's experiments train by the same code; they differ in their private model and in who loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.loss import cross_entropy
from fleetune.edge.engine.parameters import Parameters
from fleetune.edge.methods.pfedmoe.body import Body
from fleetune.edge.methods.pfedmoe.extractor import Extractor
from fleetune.edge.methods.pfedmoe.gate import Gate, Weights

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

HEADER = ("header.weight", "header.bias")


@dataclass(frozen=True)
class Scores:
    """Logits [n, c] of some samples.

    Attributes:
        mixture: Of the mixture, which is what a device answers with.
        shared: Of the header on the shared representation alone.
        private: Of the header on the private representation alone.
        weights: Mean weight of the private representation of each sample [n].
    """

    mixture: FloatArray
    shared: FloatArray
    private: FloatArray
    weights: FloatArray


class Mixture:
    """Shared extractor, private model, header and gate.

    Args:
        extractor: G.
        body: F.
        header: ``header.weight`` [m, c] and ``header.bias`` [c].
        gate: Weighs both.
        see: What the gate sees of some samples [n, inputs].
    """

    def __init__(
        self, extractor: Extractor, body: Body, header: Parameters, gate: Gate, see: Callable[[Indices], FloatArray]
    ) -> None:
        self.extractor, self.body, self.header, self.gate = extractor, body, header, gate
        self.header_gradient = header.blank()
        self._see = see

    @property
    def parts(self) -> tuple[tuple[Parameters, Parameters], ...]:
        """What is learned and its gradient: of the extractor, the private model, the header, and the gate."""
        return (
            (self.extractor.learned, self.extractor.gradient),
            (self.body.learned, self.body.gradient),
            (self.header, self.header_gradient),
            (self.gate.learned, self.gate.gradient),
        )

    def gradient(self, batch: Indices, labels: NDArray[np.int64]) -> float:
        """Replace the gradients of θ, ω, header and gate by those of the batch's mean cross-entropy.

        Args:
            batch: Sample numbers [n].
            labels: Their classes [n].

        Returns:
            The summed cross-entropy.
        """
        x = self._see(batch)
        weights = self.gate.forward(x)
        upstream = np.empty_like(weights[0]), np.empty_like(weights[1])
        hot = np.zeros((len(batch), len(self.header.tensors["header.bias"])), dtype=np.float32)
        hot[np.arange(len(batch)), labels] = 1
        learned = {**self.extractor.learned.tensors, **self.header.tensors}
        into = {**self.extractor.gradient.tensors, **self.header_gradient.tensors}
        total = 0.0
        for number, (rows, data) in enumerate(self.body.groups(batch)):
            alphas = dict(zip(("alpha.global", "alpha.local"), (one[rows] for one in weights), strict=True))
            samples = self.extractor.samples(batch[rows])
            found = self.body.step(learned, into, {**samples, **data, "labels": hot[rows], **alphas}, first=number == 0)
            total += cross_entropy(found["logits"], labels[rows])[0]
            upstream[0][rows], upstream[1][rows] = found["grad.alpha.global"], found["grad.alpha.local"]
        self.gate.backward(x, upstream)
        for _, gradient in self.parts:
            gradient.vector /= len(batch)
        return total

    def gate_gradient(self, batch: Indices, labels: NDArray[np.int64]) -> float:
        """Replace the gate's gradient alone: for samples that nothing else learns from.

        Args:
            batch: Sample numbers [n].
            labels: Their classes [n].

        Returns:
            The summed cross-entropy.
        """
        x, both = self._see(batch), self.representations(batch)
        weights = self.gate.forward(x)
        loss, slope = cross_entropy(self._logits(weights, both), labels)
        back = slope @ self.header.tensors["header.weight"].T
        self.gate.backward(x, (back * both[0], back * both[1]))
        self.gate.gradient.vector /= len(batch)
        return loss

    def representations(self, indices: Indices) -> tuple[FloatArray, FloatArray]:
        """The shared and the private representation [n, m]."""
        return self.extractor.representation(indices), self.body.representation(indices)

    def scores(self, indices: Indices) -> Scores:
        """What the mixture, and each of its parts alone, makes of some samples."""
        both = self.representations(indices)
        weights = self.gate.weights(self._see(indices))
        return Scores(
            self._logits(weights, both), self._header(both[0]), self._header(both[1]), weights[1].mean(axis=1)
        )

    def _logits(self, weights: Weights, both: tuple[FloatArray, FloatArray]) -> FloatArray:
        return self._header(weights[0] * both[0] + weights[1] * both[1])

    def _header(self, representation: FloatArray) -> FloatArray:
        found: FloatArray = representation @ self.header.tensors["header.weight"] + self.header.tensors["header.bias"]
        return found

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """All that is trained, and what the gate keeps beside."""
        return {
            **self.extractor.learned.tensors,
            **self.body.learned.tensors,
            **self.header.tensors,
            **self.gate.tensors,
        }

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite the named tensors."""
        for part in (self.extractor.learned, self.body.learned, self.header):
            part.load({name: tensor for name, tensor in tensors.items() if name in part.tensors})
        self.gate.load(tensors)
