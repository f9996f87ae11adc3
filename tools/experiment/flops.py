"""How much arithmetic a network takes: multiplications and additions of its convolutions and linear maps.

Biases, ReLU and pooling are left out, as is usual: they are under one in a hundred.
"""

from __future__ import annotations

from math import prod

from fleetune.tools.pack.extractors import SIDE, Cnn

_KERNEL, _POOLED = 5, 2


def forward_flops(cnn: Cnn) -> int:
    """Operations of one picture's way to its representation, a multiplication with its addition being two."""
    side, products = SIDE, 0
    for name in ("conv1", "conv2"):
        side -= _KERNEL - 1
        products += side * side * prod(cnn.shapes[f"{name}.weight"])
        side //= _POOLED
    return 2 * (products + sum(prod(cnn.shapes[f"{name}.weight"]) for name in ("fc1", "fc2")))


def header_flops(cnn: Cnn, classes: int) -> int:
    """Operations from a representation to the logits."""
    return 2 * cnn.representation * classes


def training_flops(forward: int, samples: int) -> float:
    """Operations of training on some samples once.

    Twice as many go backwards as go forwards: one product for the gradient of the weights, one for that of the inputs.

    Args:
        forward: Operations of one sample's way forward.
        samples: How many samples.
    """
    return 3.0 * forward * samples
