"""An expert: the adapters of every block and a classification head, as one flat vector.

Blocks come first, from the input upwards, then the head. The parameters that a device trains at depth k (the
top k blocks and the head) are therefore one contiguous tail of the vector, and so are their gradient and the
optimiser's state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.parameters import Parameters, views
from fleetune.edge.pack.manifest import Manifest

FloatArray = NDArray[np.float32]

Factors = Literal["AB", "B"]
"""Which matrices of adapters are trained: both, or B alone while A stays as it began (FFA-LoRA, Sun et al. 2024)."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor of an expert lies in its vector.

    Attributes:
        blocks: Number of transformer blocks, L.
        width: Width of the features, d.
        rank: Rank r of the adapters.
        targets: Linear map that carries an adapter → (in, out).
        classes: Number of classes.
    """

    blocks: int
    width: int
    rank: int
    targets: Mapping[str, tuple[int, int]]
    classes: int

    @classmethod
    def of(cls, manifest: Manifest, classes: int) -> Layout:
        """The layout of a pack's experts for a task with ``classes`` classes."""
        return cls(manifest.blocks, manifest.width, manifest.rank, manifest.targets, classes)

    @property
    def block_size(self) -> int:
        """Parameters of one block's adapters."""
        return sum(self.rank * (rows + columns) for rows, columns in self.targets.values())

    @property
    def size(self) -> int:
        """Parameters of the whole expert."""
        return self.blocks * self.block_size + (self.width + 1) * self.classes

    def tail(self, depth: int) -> slice:
        """The parameters of the top ``depth`` blocks and the head."""
        return slice((self.blocks - depth) * self.block_size, self.size)

    def block_names(self, block: int) -> list[str]:
        """Full names of one block's adapter tensors, in their order in the vector."""
        return [f"blocks.{block}.{target}.{side}" for target in self.targets for side in "AB"]

    def names(self, depth: int, factors: Factors = "AB") -> list[str]:
        """Full names of what depth ``depth`` trains, in order."""
        active = range(self.blocks - depth, self.blocks)
        adapters = [name for block in active for name in self.block_names(block) if name[-1] in factors]
        return [*adapters, "head.weight", "head.bias"]

    def trained(self, depth: int, factors: Factors) -> slice | NDArray[np.intp]:
        """Where what depth ``depth`` trains lies in the vector, in order: with both factors the :meth:`tail`."""
        if factors == "AB":
            return self.tail(depth)
        marks = np.zeros(self.size, dtype=np.float32)
        tensors = self.views(marks)
        for name in self.names(depth, factors):
            tensors[name][...] = 1
        return np.flatnonzero(marks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full name → shape: A is [in, r], B is [r, out], the head is [d, classes] and [classes]."""
        shapes: dict[str, tuple[int, ...]] = {}
        for block in range(self.blocks):
            for target, (rows, columns) in self.targets.items():
                shapes[f"blocks.{block}.{target}.A"] = (rows, self.rank)
                shapes[f"blocks.{block}.{target}.B"] = (self.rank, columns)
        shapes["head.weight"] = (self.width, self.classes)
        shapes["head.bias"] = (self.classes,)
        return shapes

    def views(self, vector: FloatArray) -> dict[str, FloatArray]:
        """Full name → view into ``vector``."""
        return views(vector, self.shapes)


class Expert(Parameters):
    """A vector with a layout.

    Args:
        layout: Where each tensor lies.
        vector: Float32 of ``layout.size``; a zero vector by default.
    """

    def __init__(self, layout: Layout, vector: FloatArray | None = None) -> None:
        super().__init__(layout.shapes, vector, what="the expert")
        self.layout = layout

    @classmethod
    def initial(cls, layout: Layout, seed: int) -> Expert:
        """Fresh adapters: A uniform in ±1/√in and B zero, so that the backbone starts unchanged (LoRA, section 4.1)."""
        rng = np.random.default_rng(seed)
        expert = cls(layout)
        for name, tensor in expert.tensors.items():
            if name.endswith(".A") or name == "head.weight":
                bound = 1 / math.sqrt(tensor.shape[0])
                tensor[...] = rng.uniform(-bound, bound, tensor.shape)
        return expert

    def copy(self) -> Expert:
        """An independent copy."""
        return Expert(self.layout, self.vector.copy())

    def adapters(self, block: int) -> dict[str, FloatArray]:
        """Graph input → tensor of one block (``query.A``, ``query.B`` …)."""
        stem = f"blocks.{block}."
        return {name.removeprefix(stem): self.tensors[name] for name in self.layout.block_names(block)}

    def active(self, depth: int, factors: Factors = "AB") -> dict[str, FloatArray]:
        """What depth ``depth`` trains: full name → tensor."""
        return {name: self.tensors[name] for name in self.layout.names(depth, factors)}

    def gained(self, start: Expert, depth: int, factors: Factors = "AB") -> dict[str, FloatArray]:
        """What depth ``depth`` has trained since ``start``: full name → difference."""
        return Expert(self.layout, self.vector - start.vector).active(depth, factors)

    def add(self, differences: Mapping[str, NDArray[Any]]) -> None:
        """Add to the named tensors, as far as they are an expert's.

        Raises:
            DataError: A name is unknown or a shape differs.
        """
        super().add({name: tensor for name, tensor in differences.items() if not name.startswith("gate.")})

    def fingerprint_below(self, block: int) -> str:
        """Hash of the adapters below ``block``; adapters that change nothing (B = 0) count as none."""
        digest = hashlib.sha256()
        for index in range(block):
            tensors = self.adapters(index)
            if any(tensors[f"{target}.B"].any() for target in self.layout.targets):
                digest.update(index.to_bytes(4, "little"))
                for tensor in tensors.values():
                    digest.update(tensor.tobytes())
        return digest.hexdigest()

    def lowest_difference(self, other: Expert) -> int:
        """The lowest block in which the adapters of two experts differ; the number of blocks if there is none."""
        pairs = ((block, target) for block in range(self.layout.blocks) for target in self.layout.targets)
        return next((block for block, target in pairs if not self.agrees(other, block, target)), self.layout.blocks)

    def agrees(self, other: Expert, block: int, target: str) -> bool:
        """Whether two experts have the same adapter on a linear map of a block."""
        names = [f"blocks.{block}.{target}.{side}" for side in "AB"]
        return all(np.array_equal(self.tensors[name], other.tensors[name]) for name in names)

    def logits(self, features: FloatArray) -> FloatArray:
        """Class scores [n, classes] of features [n, d]."""
        return features @ self.tensors["head.weight"] + self.tensors["head.bias"]
