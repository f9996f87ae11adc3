"""``manifest.json``: what a pack holds, and the hash of each of its files."""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA = 1
"""Version of the pack's layout that this Fleetune writes and reads."""

FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

GRAPHS = (
    "embed",
    "block_forward",
    "block_backward",
    "block_backward_bottom",
    "top",
    "pool",
    "pool_backward",
)
"""Stems of the graph files of every pack, beside ``suffix_K`` and ``inference_K`` for each depth K."""


QuantisationType = Literal["nf4", "int8", "fp32"]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Backbone(_Struct, frozen=True):
    """Where the weights come from.

    Attributes:
        id: Name of the backbone.
        architecture: ``model_type`` of its Hugging Face configuration.
        sha256: Hash of the weight file that was packed.
        licence: Licence of the weights, as their source states it.
        source: Where they were taken from.
    """

    id: str
    architecture: str
    sha256: str
    licence: str
    source: str


class Quantisation(_Struct, frozen=True):
    """How matrices are stored.

    Attributes:
        type: ``nf4``: two 4-bit codes a byte (Dettmers et al. 2023, QLoRA, section 3); ``int8``: a whole number from
            -127 to 127 a value; ``fp32``: as they are.
        block_size: Values that share one scale, the largest of their absolute values.
        code: What each of the sixteen codes of ``nf4`` stands for.
    """

    type: QuantisationType
    block_size: int
    code: tuple[float, ...]


class Text(_Struct, frozen=True):
    """How text becomes token ids: BERT's WordPiece over ``vocabulary``."""

    vocabulary: str
    lowercase: bool
    max_length: int


class Image(_Struct, frozen=True):
    """How a picture becomes patches: resized to ``size`` pixels square, scaled to [0, 1], normalised per channel."""

    size: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class File(_Struct, frozen=True):
    """Size and hash of one file of the pack."""

    bytes: int
    sha256: str


class Manifest(_Struct, frozen=True):
    """The pack's table of contents.

    Attributes:
        schema: Version of the layout.
        kit: Version of Fleetune that wrote the pack.
        backbone: The source of the weights.
        blocks: Number of transformer blocks, L.
        width: Width of the hidden state, d.
        heads: Attention heads.
        epsilon: Epsilon of every layer normalisation.
        rank: Rank r of the adapters.
        targets: Linear map that carries an adapter → (in, out).
        quantisation: How matrices are stored.
        opset: ONNX operator set of the graphs.
        files: Every other file of the pack.
        text: Present when samples are text.
        image: Present when samples are pictures.
    """

    schema: int
    kit: str
    backbone: Backbone
    blocks: int
    width: int
    heads: int
    epsilon: float
    rank: int
    targets: dict[str, tuple[int, int]]
    quantisation: Quantisation
    opset: int
    files: dict[str, File]
    text: Text | None = None
    image: Image | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        if self.text is not None:
            return self.text.max_length
        assert self.image is not None
        return 1 + (self.image.size // self.image.patch) ** 2

    @property
    def sample_width(self) -> int:
        """Numbers a token of what is embedded: a token's row or a patch."""
        return self.width if self.image is None else 3 * self.image.patch**2

    @property
    def graphs(self) -> tuple[str, ...]:
        """Stems of this pack's graph files."""
        training = (f"suffix_{depth}" for depth in range(1, self.blocks + 1))
        inference = (f"inference_{depth}" for depth in range(self.blocks + 1))
        return (*GRAPHS, *training, *inference)
