"""A pack's weights in float32, and the sizes of its backbone: what an export is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.pack import Pack
from fleetune.tools.pack.architectures import ARCHITECTURES, Architecture, Geometry

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Unpacked:
    """A backbone as its pack holds it, dequantised.

    Attributes:
        manifest: The pack's.
        architecture: How it computes.
        geometry: Its sizes.
        blocks: For each block, canonical name → array; matrices are [out, in].
        outer: The tensors around the blocks.
    """

    manifest: Manifest
    architecture: Architecture
    geometry: Geometry
    blocks: list[dict[str, FloatArray]]
    outer: dict[str, FloatArray]

    @classmethod
    def of(cls, pack: Pack) -> Unpacked:
        """Dequantise a pack."""
        manifest, weights = pack.manifest, pack.weights()
        blocks = [weights.block(index) for index in range(manifest.blocks)]
        outer = {name: weights.outer(name) for name in weights.outer_names if name != "tokens.table"}
        if manifest.text is not None:
            outer["tokens.table"] = weights.rows("tokens.table", np.arange(weights.count("tokens.table")))
        geometry = Geometry(
            blocks=manifest.blocks,
            width=manifest.width,
            heads=manifest.heads,
            hidden=len(blocks[0]["fc1.bias"]),
            epsilon=manifest.epsilon,
            length=len(outer["positions.table"]),
        )
        return cls(manifest, ARCHITECTURES[manifest.backbone.architecture], geometry, blocks, outer)
