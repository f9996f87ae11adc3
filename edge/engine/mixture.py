"""A Mixture of Foundation Models: two experts on one backbone, and the gate that weighs them sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.gate import Gate, mix
from fleetune.edge.protocol.modelfile import Mix

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Mixture:
    """Two experts and a gate.

    Attributes:
        global_: The global expert.
        local: The local expert.
        gate: Weighs them.
        boundary: The gate sees the mean over real tokens of the hidden states before this block, under the global
            expert.
        mix: Whether experts are mixed at their logits or at their features; mixed features go through the local head.
    """

    global_: Expert
    local: Expert
    gate: Gate
    boundary: int
    mix: Mix

    def experts(self, of_global: FloatArray, of_local: FloatArray) -> FloatArray:
        """What is mixed, from the features [n, d] under each expert: [n, 2, classes] or [n, 2, d]."""
        if self.mix == "features":
            return np.stack([of_global, of_local], axis=1)
        return np.stack([self.global_.logits(of_global), self.local.logits(of_local)], axis=1)

    @property
    def head(self) -> tuple[FloatArray, FloatArray] | None:
        """Weight [d, classes] and bias of the head that classifies mixed features, if features are mixed."""
        if self.mix == "logits":
            return None
        return self.local.tensors["head.weight"], self.local.tensors["head.bias"]

    def logits(self, weights: FloatArray, experts: FloatArray) -> FloatArray:
        """Class scores [n, classes] from the gate's weights [n, 2] and what is mixed."""
        mixed, head = mix(weights, experts), self.head
        return mixed if head is None else mixed @ head[0] + head[1]
