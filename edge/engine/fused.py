"""A fused training step of an expert: one graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.bound import BoundGraph
from fleetune.edge.engine.expert import Expert, Layout

FloatArray = NDArray[np.float32]


class FusedStep:
    """Forward, head, loss and backward of the top ``depth`` blocks.

    Args:
        backbone: Runs the graph; it must hold the top blocks.
        depth: Active blocks.
        layout: The layout of the experts.
    """

    def __init__(self, backbone: Backbone, depth: int, layout: Layout) -> None:
        session, weights = backbone.fused(depth)
        self._graph, self._gradient = BoundGraph(session), Expert(layout)
        self._names = graph_names(layout, depth)
        self._bound: Expert | None = None
        self._labels = self._logits = np.empty((0, layout.classes), dtype=np.float32)
        self._features = np.empty((0, layout.width), dtype=np.float32)
        for name, tensor in weights.items():
            self._graph.read(name, tensor)
        for full, name in self._names.items():
            self._graph.write(f"grad.{name}", self._gradient.tensors[full])

    def run(
        self, hidden: FloatArray, mask: FloatArray, labels: NDArray[np.int64], expert: Expert
    ) -> tuple[FloatArray, FloatArray, Expert]:
        """Run a micro-batch; what is returned is overwritten by the next one.

        Args:
            hidden: Hidden states at the boundary [b, t, d].
            mask: Their mask [b, 1, t].
            labels: Classes [b].
            expert: The adapters and the head.

        Returns:
            Features [b, d], logits [b, classes], and the gradients of the summed cross-entropy.
        """
        if expert is not self._bound:
            for full, name in self._names.items():
                self._graph.read(name, expert.tensors[full])
            self._bound = expert
        if len(labels) != len(self._labels):
            classes, width = expert.layout.classes, expert.layout.width
            self._labels, self._logits = np.empty((2, len(labels), classes), dtype=np.float32)
            self._features = np.empty((len(labels), width), dtype=np.float32)
            self._graph.read("labels", self._labels)
            self._graph.write("logits", self._logits)
            self._graph.write("features", self._features)
        self._labels[...] = 0
        self._labels[np.arange(len(labels)), labels] = 1
        self._graph.read("h", hidden)
        self._graph.read("mask", mask)
        self._graph.run()
        return self._features, self._logits, self._gradient


def graph_names(layout: Layout, depth: int) -> dict[str, str]:
    """Full name of what depth ``depth`` trains → its name in the graph (``blocks.4.query.A`` → ``0.query.A``)."""
    lowest, names = layout.blocks - depth, {}
    for full in layout.names(depth):
        part, _, rest = full.removeprefix("blocks.").partition(".")
        names[full] = f"{int(part) - lowest}.{rest}" if full.startswith("blocks.") else full
    return names
