"""The gradient of a batch, put together from micro-batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.prefix import Prefix, split
from fleetune.edge.engine.suffix import Suffix

FloatArray = NDArray[np.float32]


def batch_gradient(
    suffix: Suffix,
    prefix: Prefix,
    labels: NDArray[np.int64],
    batch: NDArray[np.int64],
    micro_batch: int,
    expert: Expert,
    gradient: Expert,
) -> tuple[float, FloatArray]:
    """Replace what the suffix trains in ``gradient`` by the gradient of the batch's mean cross-entropy.

    Args:
        suffix: The active blocks.
        prefix: Hidden states of all samples at the boundary.
        labels: Class of each sample.
        batch: Sample numbers [n].
        micro_batch: Samples that go through the blocks at once.
        expert: The adapters and the head.
        gradient: Gets their gradients.

    Returns:
        The summed cross-entropy, and the features [n, d].
    """
    tail = expert.layout.tail(suffix.depth)
    gradient.vector[tail] = 0
    features = np.empty((len(batch), expert.layout.width), dtype=np.float32)
    total = 0.0
    groups = split(np.arange(len(batch)), micro_batch)
    for rows, part in zip(groups, prefix.parts([batch[rows] for rows in groups]), strict=True):
        loss, features[rows] = suffix.step(*part, labels[batch[rows]], expert, gradient)
        total += loss
    gradient.vector[tail] /= len(batch)
    return total, features
