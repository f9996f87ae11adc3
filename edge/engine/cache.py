"""The prefix cache: hidden states at a boundary, computed once for each sample and mapped from disk.

Entries are found by content: the pack, the data file, the boundary and the adapters below it. An entry at a
higher boundary is computed from the highest matching entry below it, so a round pays only for the blocks whose
adapters changed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.suffix import forward_chunk

FloatArray = NDArray[np.float32]

CHUNK = 32
"""Samples that go through a block before the next block is dequantised."""

_HIDDEN, _POOLED = "hidden.npy", "pooled.npy"


@dataclass(frozen=True)
class Prefix:
    """The hidden states of a whole data set at one boundary.

    Attributes:
        boundary: They are the input of this block.
        hidden: Float16 [n, t, d], mapped.
        pooled: Float32 [n, d]: the mean over real tokens, the input of a gate.
        lengths: Tokens of each sample [n].
    """

    boundary: int
    hidden: NDArray[np.float16]
    pooled: FloatArray
    lengths: NDArray[np.int64]

    def batch(self, indices: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Hidden states [b, t, d] and mask [b, 1, t] of some samples, cut to the longest of them."""
        longest = int(self.lengths[indices].max())
        hidden = self.hidden[indices, :longest].astype(np.float32)
        release_pages(self.hidden)
        return hidden, token_mask(self.lengths[indices], longest)


def split(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut sample numbers into groups of at most ``size``."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def token_mask(lengths: NDArray[np.int64], longest: int) -> FloatArray:
    """Mask [n, 1, t] that is 1 for real tokens."""
    return (np.arange(longest) < lengths[:, None, None]).astype(np.float32)


def release_pages(array: NDArray[Any]) -> None:
    """Give a mapped file's pages back: they stay in the system's page cache, but no longer count as this process's."""
    mapped = array
    while isinstance(mapped, np.ndarray) and mapped.base is not None:
        mapped = mapped.base
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)


class PrefixCache:
    """Keeps a few :class:`Prefix` entries in a folder.

    Args:
        folder: Where entries live; created on demand.
        backbone: Computes them.
        dataset: The samples.
        micro_batch: Samples that go through a block at once.
        entries: How many entries to keep; the least recently used goes first.
    """

    def __init__(
        self, folder: Path, backbone: Backbone, dataset: Dataset, *, micro_batch: int, entries: int = 3
    ) -> None:
        self._folder, self._backbone, self._dataset = folder, backbone, dataset
        self._micro_batch, self._entries = micro_batch, entries

    def prefix(self, boundary: int, expert: Expert) -> Prefix:
        """The hidden states at ``boundary`` under the adapters of ``expert`` below it."""
        found = self._load(boundary, expert)
        if found is None:
            below = next((p for b in range(boundary - 1, -1, -1) if (p := self._load(b, expert))), None)
            self._compute(boundary, expert, below)
            found = self._load(boundary, expert)
            assert found is not None
            self._evict()
        return found

    def _entry(self, boundary: int, expert: Expert) -> Path:
        parts = (self._backbone.pack.sha256, self._dataset.sha256, str(boundary), expert.fingerprint_below(boundary))
        return self._folder / hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    def _load(self, boundary: int, expert: Expert) -> Prefix | None:
        entry = self._entry(boundary, expert)
        if not entry.is_dir():
            return None
        os.utime(entry)
        try:
            hidden = np.load(entry / _HIDDEN, mmap_mode="r", allow_pickle=False)
            pooled = np.load(entry / _POOLED, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # a power cut left a name without its bytes
            shutil.rmtree(entry)
            return None
        return Prefix(boundary, hidden, pooled, self._dataset.lengths)

    def _compute(self, boundary: int, expert: Expert, below: Prefix | None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._backbone.hold(range(0))  # the room of an earlier suffix's blocks is needed here
        lengths = self._dataset.lengths
        width = self._backbone.pack.manifest.width
        for left in self._folder.glob(".new-*"):  # by a process that was killed: a state folder has one agent
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        try:
            hidden = np.lib.format.open_memmap(
                scratch / _HIDDEN, "w+", np.float16, (len(lengths), int(lengths.max()), width)
            )
            pooled = np.lib.format.open_memmap(scratch / _POOLED, "w+", np.float32, (len(lengths), width))
            order = np.argsort(lengths, kind="stable")  # samples of like length together: little padding
            blocks = range(below.boundary if below else 0, boundary)
            for chunk in split(order, CHUNK):
                rows = split(chunk, self._micro_batch)
                parts = [self._start(some, below) for some in rows]
                for some, (h, mask) in zip(rows, forward_chunk(self._backbone, blocks, expert, parts), strict=True):
                    hidden[some, : h.shape[1]] = h
                    pooled[some] = (mask @ h)[:, 0] / mask.sum(axis=2)
                release_pages(hidden)
            hidden.flush()
            pooled.flush()
            del hidden, pooled
            scratch.rename(self._entry(boundary, expert))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _start(self, indices: NDArray[np.int64], below: Prefix | None) -> tuple[FloatArray, FloatArray]:
        if below is not None:
            return below.batch(indices)
        h = self._dataset.embed(self._backbone, indices)
        return h, token_mask(self._dataset.lengths[indices], h.shape[1])

    def _evict(self) -> None:
        entries = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        for path in sorted(entries, key=lambda p: p.stat().st_mtime, reverse=True)[self._entries :]:
            shutil.rmtree(path)
