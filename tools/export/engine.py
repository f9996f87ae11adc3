"""What the device's engine makes of samples: the reference of every export."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.dataset import Dataset, ImageDataset, TextDataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.engine.predictor import Predictor
from fleetune.edge.engine.prefix import split, token_mask
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import cut, normalise

FloatArray = NDArray[np.float32]
Feeds = dict[str, NDArray[np.int64] | FloatArray]
"""What a model takes: ``input_ids`` and ``attention_mask`` int64 [b, t], or ``pixel_values`` float32 [b, 3, s, s]."""

_BATCH = 16


class Engine:
    """An expert or a mixture on the device's engine.

    Args:
        pack: The pack.
        model: What is run.
    """

    def __init__(self, pack: Pack, model: Expert | Mixture) -> None:
        self._manifest, self._predictor = pack.manifest, Predictor(pack, model)

    def run(self, feeds: Feeds) -> dict[str, FloatArray]:
        """``logits`` [b, classes] and, of a mixture, ``gate`` [b, 2]."""
        found = self._predictor.run(*self._sample(feeds))
        return {"logits": found.logits} | ({} if found.gate is None else {"gate": found.gate})

    def _sample(self, feeds: Feeds) -> tuple[FloatArray, FloatArray]:
        if self._manifest.image is None:
            rows = self._predictor.token_rows(feeds["input_ids"].astype(np.int64))
            return rows, feeds["attention_mask"][:, None].astype(np.float32)
        patches = cut(feeds["pixel_values"].transpose(0, 2, 3, 1).astype(np.float32), self._manifest.image)
        return patches, np.ones((len(patches), 1, patches.shape[1]), dtype=np.float32)


def probe(pack: Pack) -> Feeds:
    """A few made-up samples, always the same; texts have several lengths."""
    rng = np.random.default_rng(0)
    manifest = pack.manifest
    if manifest.image is not None:
        size = manifest.image.size
        return {"pixel_values": rng.standard_normal((4, 3, size, size), dtype=np.float32)}
    assert manifest.text is not None
    longest = manifest.text.max_length
    lengths = np.array([longest, longest // 2 + 1, 3, 1])
    mask = _attention(lengths, longest)
    tokens = rng.integers(0, pack.weights().count("tokens.table"), mask.shape)
    return {"input_ids": tokens * mask, "attention_mask": mask}


def _attention(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """``attention_mask`` [n, t] of samples."""
    return token_mask(lengths, longest)[:, 0].astype(np.int64)


def batches(data: Dataset, pack: Pack, indices: NDArray[np.int64]) -> Iterator[Feeds]:
    """Some samples of a data file."""
    for some in split(indices, _BATCH):
        if isinstance(data, TextDataset):
            longest = int(data.lengths[some].max())
            yield {"input_ids": data.ids[some, :longest], "attention_mask": _attention(data.lengths[some], longest)}
        else:
            assert isinstance(data, ImageDataset)
            assert pack.manifest.image is not None
            pictures = normalise(data.images[some], pack.manifest.image)
            yield {"pixel_values": np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))}
