"""The active suffix: from the boundary's hidden state to features, and gradients back to the boundary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone, Saved
from fleetune.edge.engine.expert import Expert

FloatArray = NDArray[np.float32]


Part = tuple[FloatArray, FloatArray]
"""A micro-batch: hidden states [b, t, d] and mask [b, 1, t]."""


def forward_chunk(backbone: Backbone, blocks: range, expert: Expert, parts: list[Part]) -> list[Part]:
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

    def features(self, parts: list[Part], expert: Expert) -> list[FloatArray]:
        """Features [b, d] of each of some micro-batches."""
        return [self.backbone.pool(*part) for part in forward_chunk(self.backbone, self.blocks, expert, parts)]

    def gradients(
        self,
        hidden: FloatArray,
        mask: FloatArray,
        expert: Expert,
        into: Expert,
        upstream: Callable[[FloatArray], FloatArray],
    ) -> None:
        """Run a micro-batch forward and backward and add the adapters' gradients to ``into``.

        Args:
            hidden: Hidden states at the boundary [b, t, d].
            mask: Their mask [b, 1, t].
            expert: The adapters.
            into: Accumulates the gradients; the head is left to ``upstream``.
            upstream: Turns features [b, d] into the gradient of the loss with respect to them.
        """
        inputs: list[FloatArray] = []
        kept: list[Saved | None] = []
        for block in self.blocks:
            inputs.append(hidden)
            if self.recompute:
                hidden = self.backbone.forward(block, hidden, mask, expert.adapters(block))
                kept.append(None)
            else:
                hidden, saved = self.backbone.forward_keep(block, hidden, mask, expert.adapters(block))
                kept.append(saved)
        gradient = self.backbone.pool_backward(hidden, mask, upstream(self.backbone.pool(hidden, mask)))
        for block in reversed(self.blocks):
            bottom = block == self.blocks[0]
            found = self.backbone.backward(
                block, inputs.pop(), mask, expert.adapters(block), gradient, kept.pop(), bottom=bottom
            )
            for name, tensor in into.adapters(block).items():
                tensor += found[f"grad.{name}"]
            if not bottom:
                gradient = found["grad.h"]
