"""What the workers of ``fleetune bench mixture`` train: the same file for both, without torch or ONNX to read it."""

from __future__ import annotations

import msgspec

CLASSES = 10
INPUTS = 3 * 32 * 32
"""Width of what the gate sees: a flattened picture."""

RATE = 0.01
"""Step size of plain SGD."""

STEPS = 4
"""Steps of a turn."""


class MixtureSpec(msgspec.Struct, frozen=True):
    """One training task.

    Attributes:
        folder: Graphs, and ``tensors.safetensors`` with initial values, ``pictures`` and ``labels``.
        network: The private network.
        batch: Samples of a step.
        threads: Threads of either side.
    """

    folder: str
    network: str
    batch: int
    threads: int
