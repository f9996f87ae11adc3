"""What the device's engine makes of samples: the reference of every export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import split
from fleetune.edge.engine.dataset import Dataset, ImageDataset, TextDataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.engine.suffix import forward_chunk
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import cut, normalise
from fleetune.tools.export.unpacked import tokens

FloatArray = NDArray[np.float32]
Feeds = dict[str, NDArray[np.int64] | FloatArray]
"""What a model takes: ``input_ids`` and ``attention_mask`` int64 [b, t], or ``pixel_values`` float32 [b, 3, s, s]."""

_BATCH = 16


@dataclass(frozen=True)
class Engine:
    """An expert or a mixture on the device's engine, in float32 from end to end.

    Attributes:
        backbone: Runs the blocks.
        model: What is run.
    """

    backbone: Backbone
    model: Expert | Mixture

    def run(self, feeds: Feeds) -> dict[str, FloatArray]:
        """``logits`` [b, classes] and, of a mixture, ``gate`` [b, 2]."""
        hidden, mask = self._embed(feeds)
        if isinstance(self.model, Expert):
            return {"logits": self.model.logits(self._features(self.model, 0, hidden, mask))}
        mixture = self.model
        ((hidden_there, _),) = forward_chunk(self.backbone, range(mixture.boundary), mixture.global_, [(hidden, mask)])
        gate = mixture.gate.weights((mask @ hidden_there)[:, 0] / mask.sum(axis=2))
        experts = mixture.experts(
            self._features(mixture.global_, mixture.boundary, hidden_there, mask),
            self._features(mixture.local, 0, hidden, mask),
        )
        return {"logits": mixture.logits(gate, experts), "gate": gate}

    def _embed(self, feeds: Feeds) -> tuple[FloatArray, FloatArray]:
        manifest = self.backbone.pack.manifest
        if manifest.image is None:
            rows = self.backbone.token_rows(feeds["input_ids"].astype(np.int64))
            return self.backbone.embed(rows), feeds["attention_mask"][:, None].astype(np.float32)
        pictures = feeds["pixel_values"].transpose(0, 2, 3, 1).astype(np.float32)
        hidden = self.backbone.embed(cut(pictures, manifest.image))
        return hidden, np.ones((len(hidden), 1, hidden.shape[1]), dtype=np.float32)

    def _features(self, expert: Expert, start: int, hidden: FloatArray, mask: FloatArray) -> FloatArray:
        last = self.backbone.blocks - 1
        (part,) = forward_chunk(self.backbone, range(start, last), expert, [(hidden, mask)])
        return self.backbone.top(*part, expert.adapters(last))


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
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(0, tokens(pack), mask.shape) * mask, "attention_mask": mask}


def batches(data: Dataset, pack: Pack) -> Iterator[Feeds]:
    """The samples of a data file."""
    for some in split(np.arange(len(data)), _BATCH):
        if isinstance(data, TextDataset):
            longest = int(data.lengths[some].max())
            mask = (np.arange(longest) < data.lengths[some][:, None]).astype(np.int64)
            yield {"input_ids": data.ids[some, :longest], "attention_mask": mask}
        else:
            assert isinstance(data, ImageDataset)
            assert pack.manifest.image is not None
            pictures = normalise(data.images[some], pack.manifest.image)
            yield {"pixel_values": np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))}
