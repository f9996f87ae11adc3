"""Tensors ↔ bytes, by a named codec such as ``f16`` or ``int4+zlib``.

The name has the steps in the order in which the sender takes them: a number format, then compression if it is named.
The receiver goes back. Between the two the arrays are laid out as safetensors, never as pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.codec.entropy import compress, decompress
from fleetune.edge.protocol.codec.numbers import Floats, Integers, NumberFormat, check_finite
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_PAYLOAD

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

MAX_VALUES = MAX_PAYLOAD // 4
"""Most values in a payload: decoded they take as many bytes as the largest payload."""

_MAX_HEADER = 1 << 20
"""Largest header of names and shapes in bytes."""

Tensors = dict[str, NDArray[np.float32]]


DEFAULT = "int4+zlib"
"""Codec that agents and the aggregator use if nothing is said."""


def add_differences(tensors: Tensors, differences: Tensors) -> Tensors:
    """Tensors and what was added to them; what is absent was zero.

    Both sides of a broadcast add it up, float32 by float32, and must come to the same bytes.
    """
    return tensors | {name: tensors[name] + t if name in tensors else t for name, t in differences.items()}


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

    def decode(self, data: bytes) -> Tensors:
        """Decode to float32.

        Raises:
            MessageError: The bytes are malformed, hold more than a payload may, or a value that is not finite.
        """
        if len(data) > MAX_PAYLOAD:
            raise MessageError(
                f"a payload of {len(data)} bytes", f"send at most {MAX_PAYLOAD}", reason="payload-too-large"
            )
        if self.compressed:
            data = decompress(data, MAX_PAYLOAD)
        if _MAX_HEADER < int.from_bytes(data[:8], "little") < len(data):
            raise MessageError(
                f"a header of more than {_MAX_HEADER} bytes", "send fewer tensors", reason="payload-too-large"
            )
        try:
            parts = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise MessageError(f"not a safetensors payload: {error}", "encode it again", reason="malformed") from error
        if (values := sum(part.size for part in parts.values())) > MAX_VALUES:
            raise MessageError(
                f"a payload of {values} values", f"send at most {MAX_VALUES}", reason="payload-too-large"
            )
        tensors = self.numbers.decode(parts)
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        return tensors


EXACT = Codec.named("f32")
"""For what must come out as it went in: hashes are of what it makes."""
