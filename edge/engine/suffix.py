"""The active suffix: from the boundary's hidden state to features, and gradients back to the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.fused import FusedStep
from fleetune.edge.engine.loss import cross_entropy

FloatArray = NDArray[np.float32]


Part = tuple[FloatArray, FloatArray]
"""A micro-batch: hidden states [b, t, d] and mask [b, 1, t]."""


def forward_chunk(backbone: Backbone, blocks: Iterable[int], expert: Expert, parts: list[Part]) -> list[Part]:
    """Send several micro-batches through some blocks, block by block, so that each is dequantised once."""
    for block in blocks:
        adapters = expert.adapters(block)
        parts = [(backbone.forward(block, hidden, mask, adapters), mask) for hidden, mask in parts]
    return parts


class Suffix:
    """The top ``depth`` blocks.

    Args:
        backbone: Runs the blocks.
        depth: How many blocks from the head are active.
        recompute: Whether to hold neither activations nor dequantised weights: slower, and almost flat in depth.
    """

    def __init__(self, backbone: Backbone, depth: int, *, recompute: bool) -> None:
        self.backbone, self.depth, self.recompute = backbone, depth, recompute
        self.blocks = range(backbone.blocks - depth, backbone.blocks)
        backbone.hold(range(0) if recompute else self.blocks)
        self._step: FusedStep | None = None

    def features(self, parts: list[Part], expert: Expert) -> list[FloatArray]:
        """Features [b, d] of each of some micro-batches."""
        *lower, last = self.blocks
        parts = forward_chunk(self.backbone, lower, expert, parts)
        return [self.backbone.top(*part, expert.adapters(last)) for part in parts]

    def step(
        self, hidden: FloatArray, mask: FloatArray, labels: NDArray[np.int64], expert: Expert, into: Expert
    ) -> tuple[float, FloatArray]:
        """Run a micro-batch forward and backward and add the gradients of its summed cross-entropy to ``into``.

        Args:
            hidden: Hidden states at the boundary [b, t, d].
            mask: Their mask [b, 1, t].
            labels: Classes [b].
            expert: The adapters and the head.
            into: Accumulates their gradients.

        Returns:
            The summed cross-entropy, and the features [b, d], which the next step may overwrite.
        """
        if self.recompute:
            return self._recomputed(hidden, mask, labels, expert, into)
        if self._step is None:
            self._step = FusedStep(self.backbone, self.depth, expert.layout)
        features, logits, gradient = self._step.run(hidden, mask, labels, expert)
        tail = expert.layout.tail(self.depth)
        into.vector[tail] += gradient.vector[tail]
        loss, _ = cross_entropy(logits, labels)
        return loss, features

    def _recomputed(
        self, hidden: FloatArray, mask: FloatArray, labels: NDArray[np.int64], expert: Expert, into: Expert
    ) -> tuple[float, FloatArray]:
        loss, features = 0.0, np.empty((0, expert.layout.width), dtype=np.float32)

        def top(found: FloatArray) -> FloatArray:
            nonlocal loss, features
            features = found
            loss, slope = cross_entropy(expert.logits(features), labels)
            into.tensors["head.weight"] += features.T @ slope
            into.tensors["head.bias"] += slope.sum(axis=0)
            gradient: FloatArray = slope @ expert.tensors["head.weight"].T
            return gradient

        self.through(hidden, mask, expert, top, into)
        return loss, features

    def through(
        self,
        hidden: FloatArray,
        mask: FloatArray,
        expert: Expert,
        top: Callable[[FloatArray], FloatArray],
        into: Expert,
    ) -> None:
        """Run a micro-batch forward and backward block by block, and add the gradients of the adapters to ``into``.

        Args:
            hidden: Hidden states at the boundary [b, t, d].
            mask: Their mask [b, 1, t].
            expert: The adapters.
            top: From features [b, d] to the gradient of the loss with respect to them.
            into: Accumulates the gradients.
        """
        inputs: list[FloatArray] = []
        for block in self.blocks:
            inputs.append(hidden)
            hidden = self.backbone.forward(block, hidden, mask, expert.adapters(block))
        gradient = self.backbone.pool_backward(hidden, mask, top(self.backbone.pool(hidden, mask)))
        for block in reversed(self.blocks):
            bottom = block == self.blocks[0]
            found = self.backbone.backward(block, inputs.pop(), mask, expert.adapters(block), gradient, bottom=bottom)
            for name, tensor in into.adapters(block).items():
                tensor += found[f"grad.{name}"]
            if not bottom:
                gradient = found["grad.h"]
