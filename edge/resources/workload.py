"""What a job asks of a device with its samples."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.dataset import SPLITS, Dataset
from fleetune.edge.engine.entry import Entry
from fleetune.edge.engine.prefix import CHUNK, split
from fleetune.edge.engine.tokens import CODECS, CodecName
from fleetune.edge.pack.manifest import Manifest

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)

_MIB = 1 << 20


class Workload(msgspec.Struct, frozen=True):
    """What a round asks for.

    Attributes:
        train: Training samples.
        evaluate: Samples that are evaluated each round.
        epochs: Passes over the training samples.
        batch: Samples an optimiser step.
        max_depth: Deepest that any device of the job goes.
        length: Mean tokens of a sample.
        longest: Tokens of the longest sample.
        padded: Micro-batch → mean tokens of a sample when each is padded to the longest of its micro-batch.
        blocks: Blocks of the backbone.
        entry_mib: Codec → MiB of one entry of the prefix cache: the hidden states of all samples at one boundary.
        batch_mib: MiB of the hidden states that are there at once when a batch computes its own.
    """

    train: int
    evaluate: int
    epochs: int
    batch: int
    max_depth: int
    length: float
    longest: int
    padded: Mapping[int, float]
    blocks: int
    entry_mib: Mapping[CodecName, float]
    batch_mib: float

    @classmethod
    def of(cls, dataset: Dataset, manifest: Manifest, *, epochs: int, batch: int, max_depth: int) -> Workload:
        """What a round asks of a device with these samples and this pack."""
        train, *others = (dataset.lengths[dataset.indices(split)] for split in SPLITS)
        return cls.of_lengths(train, np.concatenate(others), manifest, epochs=epochs, batch=batch, max_depth=max_depth)

    @classmethod
    def of_lengths(
        cls,
        train: NDArray[np.int64],
        others: NDArray[np.int64],
        manifest: Manifest,
        *,
        epochs: int,
        batch: int,
        max_depth: int,
    ) -> Workload:
        """The same, from the tokens of each training sample [n] and of each sample that is evaluated [m]."""
        lengths, width = np.concatenate([train, others]), manifest.width
        entries = {codec: Entry.blank("0" * 64, codec, manifest.blocks, lengths, width) for codec in CODECS}
        return cls(
            train=len(train),
            evaluate=len(others),
            epochs=epochs,
            batch=batch,
            max_depth=max_depth,
            length=float(lengths.mean()),
            longest=int(lengths.max()),
            padded={size: padded_length(train, batch, size) for size in MICRO_BATCHES if size <= batch},
            blocks=manifest.blocks,
            entry_mib={codec: entry.size / _MIB for codec, entry in entries.items()},
            batch_mib=min(batch, CHUNK) * int(train.max()) * width * 4 / _MIB,
        )


def padded_length(lengths: NDArray[np.int64], batch: int, micro_batch: int) -> float:
    """Mean tokens of a sample when training pads each to the longest of its micro-batch.

    Args:
        lengths: Tokens of each sample [n].
        batch: Samples an optimiser step, drawn at random and cut into micro-batches of like length.
        micro_batch: Samples that go through a block at once.
    """
    order = np.random.default_rng(0).permutation(lengths)
    groups = [group for some in split(order, batch) for group in split(np.sort(some), micro_batch)]
    return sum(len(group) * int(group.max()) for group in groups) / len(lengths)
