"""Inference: the whole backbone as one graph, in which two experts share all blocks that they agree on.

One prefix pass and two suffix passes: what both experts compute alike is computed once; from the lowest block in which
they differ on, their rows follow each other through the same products, so frozen weights are read once for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.runtime import open_session
from fleetune.edge.pack.pack import Pack

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a forward pass found.

    Attributes:
        features: Of each expert [experts, b, d].
        pooled: Block → mean over real tokens of the hidden states before it [b, d], under the first expert.
    """

    features: FloatArray
    pooled: dict[int, FloatArray]


class Inference:
    """A forward pass of one or two experts.

    All weights are float32 in memory, arranged by ONNX Runtime for its products, with the adapters that both experts
    share merged into them.

    Args:
        pack: The pack.
        experts: One expert, or two.
        threads: Threads of ONNX Runtime; 0 means one for each core.

    Attributes:
        depth: Blocks from the head in which two experts differ.
    """

    def __init__(self, pack: Pack, experts: Sequence[Expert], *, threads: int) -> None:
        self._weights = pack.weights()
        self._positions = self._weights.outer("positions.table")
        self.depth = 0
        if len(experts) == 2:  # the same ones share all blocks but the last
            blocks = pack.manifest.blocks
            self.depth = max(1, blocks - experts[0].lowest_difference(experts[1]))
        self._boundary = pack.manifest.blocks - self.depth
        self._session = open_session(
            pack.graph(f"inference_{self.depth}"), threads, initialisers=self._given(pack, experts[0])
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._adapters = {
            f"{block}.{name}": np.stack([expert.adapters(block)[name] for expert in experts])
            for block in range(self._boundary, pack.manifest.blocks)
            for name in experts[0].adapters(block)
        }

    def _given(self, pack: Pack, expert: Expert) -> dict[str, FloatArray]:
        """Weights as the graph names them, merged with the adapters that all experts share (LoRA, section 4.1)."""
        given = {name: self._weights.outer(name) for name in self._weights.outer_names if not name.endswith(".table")}
        for block in range(pack.manifest.blocks):
            tensors = self._weights.block(block)
            if block < self._boundary:
                adapters = expert.adapters(block)
                for target in pack.manifest.targets:
                    change = (adapters[f"{target}.A"] @ adapters[f"{target}.B"]).T
                    tensors[f"{target}.weight"] = tensors[f"{target}.weight"] + change
            given |= {f"{block}.{name}": tensor for name, tensor in tensors.items()}
        return given

    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [b, t] → [b, t, d]."""
        return self._weights.rows("tokens.table", ids)

    def run(self, sample: FloatArray, mask: FloatArray) -> Answer:
        """Run a batch.

        Args:
            sample: Token rows or patches [b, t, e].
            mask: 1 for a real token [b, 1, t].
        """
        feeds = {"sample": sample, "positions": self._positions[: sample.shape[1]], "mask": mask, **self._adapters}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        features = found.pop("features")
        pooled = {int(name.removeprefix("pooled.")): tensor[: len(sample)] for name, tensor in found.items()}
        return Answer(features.reshape(-1, len(sample), features.shape[1]), pooled)
