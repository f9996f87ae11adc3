"""What a worker is to train: the same file for every peer."""

from __future__ import annotations

import msgspec


class Spec(msgspec.Struct, frozen=True):
    """One training task.

    Attributes:
        backbone: Folder in Hugging Face format, for torch.
        pack: Its pack, for the engine.
        data: The engine's data file.
        samples: The same samples as tensors, for torch.
        initial: Initial adapters and head, for both.
        cache: The engine's prefix cache.
        depth: Active blocks, from the head.
        rank: Rank of the adapters.
        classes: Classes of the task.
        batch: Samples an optimiser step.
        micro_batch: Samples that the engine computes at once.
        rate: Step size of Adam.
        decay: Its decoupled weight decay.
        threads: Threads of either side.
        quantised: Whether torch loads the backbone in 4 bits.
        trains: Whether the workers are to train, or only to answer.
    """

    backbone: str
    pack: str
    data: str
    samples: str
    initial: str
    cache: str
    depth: int
    rank: int
    classes: int
    batch: int
    micro_batch: int
    rate: float
    decay: float
    threads: int
    quantised: bool = False
    trains: bool = True
