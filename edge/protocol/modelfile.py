"""``model.safetensors``: what a run leaves to take home, in one file that says what it is.

Tensors are float32: ``global.blocks.3.query.A``, ``local.head.bias``, ``gate.weight`` and so on. The card is one entry
of JSON in safetensors' own metadata. A block that nobody trained may be absent: its adapters change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import UNDECODABLE, ModelError, field_and_reason
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.edge.protocol.header import HeaderError, read_header
from fleetune.edge.protocol.messages import Sha256, Word, encode

SCHEMA = 1
"""Version of the file's layout that this Fleetune writes and reads."""

FILE = "model.safetensors"
GLOBAL, LOCAL, GATE = "global.", "local.", "gate."
"""What the names of each part's tensors begin with."""

_ENTRY = "fleetune"
_MAX_FILE = 256 << 20
_MAX_CARD = 64 << 10

REMEDY = "copy it again; on a device, delete it: the local expert then starts anew"
"""What to do about a damaged file."""

MAX_CLASSES = 4096
"""Most classes of a task."""

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]

Tensors = dict[str, NDArray[np.float32]]
Mix = Literal["logits", "features"]
GateKind = Literal["sample", "element", "fixed"]


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model file says of itself.

    Attributes:
        schema: Version of the layout.
        kit: Version of Fleetune that wrote the file.
        kind: ``global`` holds the global expert alone; ``mixture`` also the local expert and the gate; ``pfedmoe`` a
            device's mixture with the extractor that its fleet shares.
        job: The job that trained it.
        run: The job's run.
        pack: SHA-256 of the pack's manifest.
        weights: SHA-256 of the pack's quantised weights, without which the tensors mean nothing.
        backbone: SHA-256 of the backbone's weights before they were quantised.
        blocks: Number of transformer blocks, L.
        rank: Rank of the adapters.
        targets: Linear maps that carry an adapter, in the pack's order.
        classes: Number of classes.
        boundary: The gate sees the mean over real tokens of the hidden states before this block, computed under the
            global expert: L less the deepest that any device of the job may train.
        mix: Whether experts are mixed at their logits or at their features.
        extractor: SHA-256 of what devices must have alike to share an extractor; of a ``pfedmoe`` alone.
        gate: What weighs the shared and the private representation; likewise.
    """

    schema: int = SCHEMA
    kit: Word
    kind: Literal["global", "mixture", "pfedmoe"]
    job: Word
    run: Word
    pack: Sha256
    weights: Sha256
    backbone: Sha256
    blocks: _Size
    rank: _Size
    targets: Annotated[tuple[Word, ...], msgspec.Meta(max_length=64)]
    classes: Annotated[int, msgspec.Meta(ge=2, le=MAX_CLASSES)]
    boundary: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    mix: Mix
    extractor: Sha256 | None = None
    gate: GateKind | None = None


class _Version(msgspec.Struct, frozen=True):
    schema: int
    kit: Word


def write_model_file(path: Path, card: Card, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace ``path`` by a model file, atomically."""
    data: bytes = safetensors.numpy.save(dict(tensors), metadata={_ENTRY: encode(card).decode()})
    write_atomic(path, data)


def read_model_file(path: Path) -> tuple[Card, Tensors]:
    """Read a model file.

    Raises:
        ModelError: There is none, it is damaged or too large, or its schema is another one.
    """
    if not path.is_file():
        raise ModelError(
            f"{path} is not a file",
            f"name a device's STATE/runs/RUN/JOB/{FILE}, or the aggregator's STATE/JOB/{FILE}",
        )
    if path.stat().st_size > _MAX_FILE:
        raise ModelError(f"{path} is larger than {_MAX_FILE >> 20} MiB", f"name a {FILE} that Fleetune wrote")
    raw = read_bytes(path, _MAX_FILE)
    try:
        header = read_header(raw)
    except HeaderError as error:
        raise ModelError(f"{path} is damaged: {error}", REMEDY) from error
    card = _read_card(path, header.metadata.get(_ENTRY))
    tensors: Tensors = {name: slot.array(raw) for name, slot in header.slots.items()}
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            what = "values that are not finite" if tensor.dtype == np.float32 else f"{tensor.dtype}, not float32"
            raise ModelError(f"{path} is damaged: tensor {name[:80]!r} holds {what}", REMEDY)
    return card, tensors


def _read_card(path: Path, entry: str | None) -> Card:
    if entry is None or len(entry) > _MAX_CARD:
        raise ModelError(f"{path} is not a model of Fleetune", f"name a {FILE} that a device or the aggregator wrote")
    try:
        version = msgspec.json.decode(entry, type=_Version)
        if version.schema != SCHEMA:
            raise ModelError(
                f"{path} has schema {version.schema} (written by Fleetune {version.kit}), "
                f"this Fleetune reads schema {SCHEMA}",
                f"use Fleetune {version.kit}",
            )
        return msgspec.json.decode(entry, type=Card)
    except UNDECODABLE as error:
        field, reason = field_and_reason(error)
        raise ModelError(f"{path} is damaged: {f'field {field}: ' if field else ''}{reason}", REMEDY) from error
