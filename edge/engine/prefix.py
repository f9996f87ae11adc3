"""What a suffix starts from: the hidden states of a whole data set at one boundary, batch by batch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.suffix import Part, forward_chunk

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

CHUNK = 32
"""Samples that go through a block before the next block is dequantised."""


def split(indices: Indices, size: int) -> list[Indices]:
    """Cut sample numbers into groups of at most ``size``."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def token_mask(lengths: NDArray[np.int64], longest: int) -> FloatArray:
    """Mask [n, 1, t] that is 1 for real tokens."""
    return (np.arange(longest) < lengths[:, None, None]).astype(np.float32)


class Prefix(ABC):
    """The hidden states of a data set at one boundary.

    Args:
        boundary: They are the input of this block.
        lengths: Tokens of each sample [n].
        recomputed: Blocks that run anew for each sample that is read; 0 where hidden states are stored.
    """

    def __init__(self, boundary: int, lengths: NDArray[np.int64], *, recomputed: int = 0) -> None:
        self.boundary, self.lengths, self.recomputed = boundary, lengths, recomputed

    @property
    @abstractmethod
    def pooled(self) -> FloatArray:
        """Float32 [n, d]: the mean over real tokens, the input of a gate."""

    @abstractmethod
    def parts(self, groups: Sequence[Indices]) -> Iterator[Part]:
        """Hidden states [b, t, d] and mask [b, 1, t] of each group of samples in turn, cut to its longest sample.

        They may be views into memory that is used again: valid until the next part, of whatever call, is asked for.
        """

    @abstractmethod
    def chunk(self, groups: Sequence[Indices]) -> list[Part]:
        """The same all at once, each in memory of its own; for groups of :data:`CHUNK` samples together."""

    def batch(self, indices: Indices) -> Part:
        """Hidden states [b, t, d] and mask [b, 1, t] of some samples, valid as long as in :meth:`parts`."""
        return next(self.parts([indices]))


class ComputedPrefix(Prefix):
    """Runs the frozen blocks whenever samples are read.

    Args:
        backbone: Runs the blocks.
        dataset: The samples.
        expert: Its adapters below the boundary count; they must not change.
        boundary: The block that the hidden states go into.
        micro_batch: Samples that go through a block at once when all samples are read.
        below: Hidden states at a lower boundary to start from; by default the samples themselves.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        expert: Expert,
        boundary: int,
        *,
        micro_batch: int,
        below: Prefix | None = None,
    ) -> None:
        self._blocks = range(below.boundary if below else 0, boundary)
        super().__init__(boundary, dataset.lengths, recomputed=len(self._blocks))
        self.dataset = dataset
        self._backbone, self._expert = backbone, expert
        self._micro_batch, self._below = micro_batch, below

    @functools.cached_property
    def pooled(self) -> FloatArray:
        """Float32 [n, d]: the mean over real tokens; computed when it is first asked for."""
        pooled = np.empty((len(self.dataset), self._backbone.pack.manifest.width), dtype=np.float32)
        for some, _, means in self.sweep():
            pooled[some] = means
        return pooled

    def parts(self, groups: Sequence[Indices]) -> Iterator[Part]:
        """Hidden states and masks; up to :data:`CHUNK` samples at once share the work of dequantising a block."""
        waiting: list[Indices] = []
        for group in groups:
            if waiting and sum(map(len, waiting)) + len(group) > CHUNK:
                yield from self.chunk(waiting)
                waiting = []
            waiting.append(group)
        yield from self.chunk(waiting)

    def chunk(self, groups: Sequence[Indices]) -> list[Part]:
        """Hidden states and masks, computed block by block."""
        return forward_chunk(self._backbone, self._blocks, self._expert, self._start(groups))

    def _start(self, groups: Sequence[Indices]) -> list[Part]:
        if self._below is not None:
            return self._below.chunk(groups)
        embedded = [(self.dataset.embed(self._backbone, some), self.lengths[some]) for some in groups]
        return [(hidden, token_mask(lengths, hidden.shape[1])) for hidden, lengths in embedded]

    def sweep(self) -> Iterator[tuple[Indices, Part, FloatArray]]:
        """Every sample once, the shortest first: some samples, their hidden states and mask, and their means [b, d].

        Raises:
            DataError: A hidden state is NaN or infinite; names the samples.
        """
        for chunk in split(by_length(self.lengths), CHUNK):  # samples of like length together: little padding
            groups = split(chunk, self._micro_batch)
            for some, (hidden, mask) in zip(groups, self.chunk(groups), strict=True):
                means = (mask @ hidden)[:, 0] / mask.sum(axis=2)
                self.dataset.check_finite(some, means, f"the hidden state before block {self.boundary}")
                yield some, (hidden, mask), means


def by_length(lengths: NDArray[np.int64]) -> Indices:
    """Sample numbers from the shortest to the longest; equals keep their order."""
    return np.argsort(lengths, kind="stable")
