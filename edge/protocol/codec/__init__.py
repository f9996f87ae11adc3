"""Tensors ↔ bytes, by a named codec such as ``f16`` or ``int4+zlib``.

The name has the steps in the order in which the sender takes them: a number format, then compression if it is named.
The receiver goes back. Between the two the arrays are laid out as safetensors, never as pickle.

Who decodes knows what tensors there may be. Nothing else is made an array of, and no more memory is taken than these
need: the float32 values themselves, and less than twice as much again on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.codec.entropy import compress, decompress, most_compressed
from fleetune.edge.protocol.codec.numbers import Floats, Integers, NumberFormat, Part, Shapes, check_finite
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.header import PREFIX, Header, HeaderError, read_header

NUMBERS: dict[str, NumberFormat] = {
    "f32": Floats(np.float32),
    "f16": Floats(np.float16),
    "int8": Integers(8),
    "int4": Integers(4, spread=5.0),
}
"""Name → number format."""

COMPRESSED = "+zlib"
"""What the name of a codec ends with whose bytes are compressed."""

CODECS = tuple(name + ending for name in NUMBERS for ending in ("", COMPRESSED))
"""Every codec by its name."""

_ENTRY = 128
"""Bytes of a tensor's entry in the header, at most, beside its name and its shape."""

_REMEDY = "send what the round asks for: the same pack, method and number of classes on both sides"

Tensors = dict[str, NDArray[np.float32]]


DEFAULT = "int4+zlib"
"""Codec that agents and the aggregator use if nothing is said."""


def add_differences(tensors: Tensors, differences: Tensors) -> Tensors:
    """Tensors and what was added to them; what is absent was zero.

    Both sides of a broadcast add it up, float32 by float32, and must come to the same bytes.
    """
    return tensors | {name: tensors[name] + t if name in tensors else t for name, t in differences.items()}


def shapes_of(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    return {name: tensor.shape for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Codec:
    """Turns named tensors into bytes, and back.

    Attributes:
        name: Its name, as it stands in a manifest.
        numbers: What becomes of each value.
        compressed: Whether the bytes are compressed.
    """

    name: str
    numbers: NumberFormat
    compressed: bool

    @property
    def exact(self) -> bool:
        """Whether what arrives is what was sent."""
        return self.name.startswith("f32")

    @classmethod
    def named(cls, name: str) -> Codec:
        """A codec by its name.

        Raises:
            MessageError: There is none of that name.
        """
        if name not in CODECS:
            raise MessageError(
                f"the codec {name!r} is unknown", f"use one of {', '.join(CODECS)}", reason="unknown-codec"
            )
        return cls(name, NUMBERS[name.removesuffix(COMPRESSED)], name.endswith(COMPRESSED))

    def encode(self, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
        """Encode tensors."""
        data: bytes = safetensors.numpy.save(self.numbers.encode(tensors))
        return compress(data) if self.compressed else data

    def most(self, shapes: Shapes) -> int:
        """Most bytes that tensors take, or some of them.

        Args:
            shapes: Name → shape.
        """
        size = self._most_before_compression(self.numbers.layout(shapes))
        return most_compressed(size) if self.compressed else size

    @staticmethod
    def _most_before_compression(layout: Mapping[str, Part]) -> int:
        return PREFIX + _most_header(layout) + sum(part.size for part in layout.values())

    def decode(self, data: bytes, shapes: Shapes) -> Tensors:
        """Decode to float32. What is exact may be a view into ``data``, and is not to be written to.

        Args:
            data: The bytes.
            shapes: Name → shape of every tensor that may be in them; some may be absent.

        Raises:
            MessageError: The bytes are malformed, hold another tensor, or a value that is not finite.
        """
        if len(data) > (most := self.most(shapes)):
            raise MessageError(
                f"a payload of {len(data)} bytes", f"send at most {most} for these tensors", reason="payload-too-large"
            )
        layout = self.numbers.layout(shapes)
        if self.compressed:
            data = decompress(data, self._most_before_compression(layout))
        try:
            header = read_header(data, _most_header(layout))
        except HeaderError as error:
            raise MessageError(f"not a payload: {error}", "encode it again", reason=error.reason) from error
        present = self._check(header, shapes)
        tensors = self.numbers.decode({name: slot.array(data) for name, slot in header.slots.items()}, present)
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        return tensors

    def _check(self, header: Header, shapes: Shapes) -> Shapes:
        """Shapes of the tensors that are here, once all that travelled is known to be as they make it.

        Raises:
            MessageError: Something else is here, or something of another type or shape.
        """
        if header.metadata:
            raise MessageError("a payload with metadata", "send tensors alone", reason="malformed")
        if len(header.slots) > (most := len(self.numbers.layout(shapes))):
            raise MessageError(
                f"{len(header.slots)} tensors, of {most} that there may be", _REMEDY, reason="too-many-tensors"
            )
        present = {name: shape for name, shape in shapes.items() if name in header.slots}
        layout = self.numbers.layout(present)
        for name in header.slots:
            if name not in layout:
                raise MessageError(f"tensor {name[:80]!r} is not expected", _REMEDY, reason="unexpected-tensor")
        for name, part in layout.items():
            slot = header.slots.get(name)
            if slot is None:
                raise MessageError(f"the payload has no {name}", "encode it again", reason="malformed")
            if slot.dtype != part.dtype:
                raise MessageError(
                    f"tensor {name} is {slot.dtype}, the codec says {part.dtype}",
                    "encode it again",
                    reason="wrong-dtype",
                )
            if slot.shape != part.shape:
                raise MessageError(
                    f"tensor {name} has the shape {slot.shape}, expected {part.shape}", _REMEDY, reason="wrong-shape"
                )
        return present


def _most_header(layout: Mapping[str, Part]) -> int:
    """Bytes of the header of these arrays, at most."""
    return _ENTRY + sum(_ENTRY + len(msgspec.json.encode(name)) + 12 * len(part.shape) for name, part in layout.items())


EXACT = Codec.named("f32")
"""For what must come out as it went in: hashes are of what it makes."""


def read_exact(data: bytes) -> Tensors:
    """What this side has written itself, with :data:`EXACT`: views into the bytes, so that it takes no more memory.

    Raises:
        MessageError: The bytes are damaged.
    """
    try:
        slots = read_header(data).slots
    except HeaderError as error:
        raise MessageError(f"the tensors are damaged: {error}", "encode them again", reason=error.reason) from error
    return EXACT.decode(data, {name: slot.shape for name, slot in slots.items()})
