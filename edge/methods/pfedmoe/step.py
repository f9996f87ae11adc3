"""A training step of the mixture: forward and backward of a micro-batch, whatever the private model is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.bound import BoundGraph

FloatArray = NDArray[np.float32]


class StepGraph:
    """A graph of a pack that puts out the gradient ``grad.X`` of what it takes as ``X``.

    Args:
        graph: The graph.
        learned: Name in the graph → tensor, for all that is learned; read where it lies.
        frozen: The same of what never changes.
        gradient: Name in the graph → where the gradient of a batch is added up, for all that is learned.
    """

    def __init__(
        self,
        graph: BoundGraph,
        learned: Mapping[str, FloatArray],
        frozen: Mapping[str, FloatArray],
        gradient: Mapping[str, FloatArray],
    ) -> None:
        self._graph, self._gradient = graph, gradient
        for name, tensor in {**frozen, **learned}.items():
            graph.read(name, tensor)
        self._further: dict[str, FloatArray] = {}
        self._into: Mapping[str, FloatArray] = {}  # where gradients are written now
        self._found: dict[str, FloatArray] = {}
        self._rows = 0

    def reserve(self) -> None:
        """Take the memory that batches of more than one micro-batch need."""
        self._further = self._further or {name: np.zeros_like(tensor) for name, tensor in self._gradient.items()}

    def run(self, data: Mapping[str, FloatArray], *, first: bool) -> Mapping[str, FloatArray]:
        """Run a micro-batch. The first of a batch replaces the gradient, the others are added.

        Args:
            first: Whether it is the first of a batch.
            data: Name in the graph → what changes from one micro-batch to the next: ``labels``, one-hot [b, c], and
                ``alpha.global``, ``alpha.local``, samples, or what was computed of them.

        Returns:
            ``logits`` [b, c], and the gradients of the summed cross-entropy with respect to ``data``, as far as the
            graph has them; overwritten by the next micro-batch.
        """
        graph = self._graph
        if not first:
            self.reserve()
        into = self._gradient if first else self._further
        if into is not self._into:
            self._into = into
            for name, tensor in into.items():
                graph.write(f"grad.{name}", tensor)
        if len(data["labels"]) != self._rows:
            self._rows, shapes = len(data["labels"]), {"logits": data["labels"].shape}
            shapes |= {f"grad.{name}": value.shape for name, value in data.items()}
            self._found = {name: np.empty(shape, np.float32) for name, shape in shapes.items() if name in graph.outputs}
            for name, tensor in self._found.items():
                graph.write(name, tensor)
        for name, tensor in data.items():
            graph.read(name, tensor)
        graph.run()
        if not first:
            for name, tensor in self._further.items():
                self._gradient[name] += tensor
        return self._found
