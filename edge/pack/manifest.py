"""``manifest.json``: what a pack holds, and the hash of each of its files."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.messages import Phrase, Sha256, Word

SCHEMA = 1
"""Version of the pack's layout that this Fleetune writes and reads."""

FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"

MAX_PICTURE = 4096
"""Longest side of a picture in pixels."""

MAX_EXTRACTOR = 1 << 24
"""Most values that the tensors of an extractor have together: 64 MiB, of which a device holds three times as much."""

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

EXTRACTOR_GRAPHS = ("extractor", "gate", "gate_train", "gate_backward")
"""The same of a pack with a shared extractor, beside ``mixture_K`` for each depth K."""


QuantisationType = Literal["nf4", "int8", "fp32"]

# More than any backbone has that a device can run, and little enough to count with.
Blocks = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Width = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Rows = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Value = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Deviation = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


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

    id: Phrase
    architecture: Word
    sha256: Sha256
    licence: Phrase
    source: Phrase


class Quantisation(_Struct, frozen=True):
    """How matrices are stored.

    Attributes:
        type: ``nf4``: two 4-bit codes a byte (Dettmers et al. 2023, QLoRA, section 3); ``int8``: a whole number from
            -127 to 127 a value; ``fp32``: as they are.
        block_size: Values that share one scale, the largest of their absolute values.
        code: What each of the sixteen codes of ``nf4`` stands for.
    """

    type: QuantisationType
    block_size: Rows
    code: Annotated[tuple[Value, ...], msgspec.Meta(max_length=256)]


class Text(_Struct, frozen=True):
    """How text becomes token ids: BERT's WordPiece over ``vocabulary``."""

    vocabulary: Phrase
    lowercase: bool
    max_length: Annotated[int, msgspec.Meta(ge=3, le=1 << 16)]


class Image(_Struct, frozen=True):
    """How a picture becomes patches: resized to ``size`` pixels square, scaled to [0, 1], normalised per channel."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_PICTURE)]
    patch: Annotated[int, msgspec.Meta(ge=1, le=MAX_PICTURE)]
    mean: tuple[Value, Value, Value]
    std: tuple[Deviation, Deviation, Deviation]


class Extractor(_Struct, frozen=True):
    """The small network that devices with different backbones train together (pFedMoE), and its companions.

    Attributes:
        kind: ``cnn`` for pictures, ``dan`` for text.
        representation: Width of what it and the backbone's projection put out, m.
        gate: Width of the gate's hidden layer.
        shapes: Full name → shape of its tensors.
        sha256: Hash of all that two devices must have alike to train it together: the above, and the token table that
            it starts from.
    """

    kind: Literal["cnn", "dan"]
    representation: Width
    gate: Width
    shapes: Annotated[
        dict[Word, Annotated[tuple[Rows, ...], msgspec.Meta(min_length=1, max_length=4)]], msgspec.Meta(max_length=64)
    ]
    sha256: Sha256


class File(_Struct, frozen=True):
    """Size and hash of one file of the pack."""

    bytes: Bytes
    sha256: Sha256


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
        extractor: Present when the pack was written to share one.
    """

    schema: int
    kit: Word
    backbone: Backbone
    blocks: Blocks
    width: Side
    heads: Side
    epsilon: Deviation
    rank: Side
    targets: Annotated[dict[Word, tuple[Rows, Rows]], msgspec.Meta(max_length=64)]
    quantisation: Quantisation
    opset: Side
    files: Annotated[dict[str, File], msgspec.Meta(max_length=8192)]
    text: Text | None = None
    image: Image | None = None
    extractor: Extractor | None = None

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
        mixture = [f"mixture_{depth}" for depth in range(self.blocks + 1)] if self.extractor else []
        shared = EXTRACTOR_GRAPHS if self.extractor else ()
        return (*GRAPHS, *training, *inference, *shared, *mixture)
