"""The header of safetensors bytes, which says where each tensor lies; all of it is checked before any of it is used.

Eight bytes hold its length, then comes JSON: name → type, shape, and where the tensor begins and ends in the bytes that
follow. The safetensors library makes arrays of whatever it finds; whoever knows what to expect asks here first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import UNDECODABLE

PREFIX = 8
"""Bytes of the header's length."""

MAX_HEADER = 1 << 20
"""Largest header in bytes, for a reader who does not know what to expect."""

_MAX_VALUES = 1 << 40
_MAX_RANK = 8
_METADATA = "__metadata__"

BFLOAT16 = np.dtype("V2")
"""NumPy has no such numbers: these are their bytes."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Every type of the format that a file of ours, or a backbone, may hold."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VALUES)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_RANK)]
    data_offsets: tuple[_Size, _Size]


class HeaderError(ValueError):
    """The bytes are not well-formed.

    Args:
        what: What is wrong.
        reason: A short code: ``malformed``, ``payload-too-large`` or ``duplicate-tensor``.
    """

    def __init__(self, what: str, reason: str = "malformed") -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies.

    Attributes:
        dtype: Type of its values.
        shape: Its shape.
        start: Where it begins in all of the bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def array(self, data: Any) -> NDArray[Any]:
        """The tensor, as a view into the bytes."""
        return np.frombuffer(data, self.dtype, math.prod(self.shape), self.start).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        slots: Name → where the tensor lies.
        metadata: Texts that came with the tensors.
    """

    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]


def header_length(start: bytes, size: int, most: int = MAX_HEADER) -> int:
    """Bytes of the JSON, from the first eight.

    Args:
        start: The first bytes.
        size: Number of all bytes.
        most: Largest header in bytes.

    Raises:
        HeaderError: The header does not fit the bytes, or is larger than ``most``.
    """
    length = int.from_bytes(start[:PREFIX], "little")
    if len(start) < PREFIX or length > size - PREFIX:
        raise HeaderError("its header does not fit the file")
    if length > most:
        raise HeaderError(f"its header has {length} bytes, more than {most}", "payload-too-large")
    return length


def parse_header(raw: bytes, size: int) -> Header:
    """Check a header.

    Args:
        raw: Its JSON.
        size: Number of all bytes, those before and in the header too.

    Raises:
        HeaderError: It is not such JSON, a name is there twice, a type is unknown, or the tensors do not fill the bytes
            one after the other.
    """
    try:
        found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(found.pop(_METADATA, b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in found.items()}
        json.loads(raw, object_pairs_hook=_refuse_twins)
    except HeaderError:
        raise
    except (*UNDECODABLE, ValueError) as error:
        raise HeaderError(f"its header is not one: {str(error)[:200]}") from error
    start, slots = PREFIX + len(raw), dict[str, Slot]()
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise HeaderError(f"tensor {name[:80]!r} has the unknown type {entry.dtype[:16]!r}")
        # With an empty side counted as one: NumPy multiplies the others before it looks at the product.
        if math.prod(max(1, side) for side in entry.shape) > _MAX_VALUES:
            raise HeaderError(f"tensor {name[:80]!r} has the shape {list(entry.shape)}")
        if begin != at or end - begin != math.prod(entry.shape) * dtype.itemsize:
            raise HeaderError(f"tensor {name[:80]!r} does not lie behind the one before")
        slots[name] = Slot(dtype, entry.shape, start + begin)
        at = end
    if start + at != size:
        raise HeaderError(f"its tensors end at byte {start + at} of {size}")
    return Header(slots, metadata)


def read_header(data: bytes, most: int = MAX_HEADER) -> Header:
    """Check the header of bytes that are in memory.

    Raises:
        HeaderError: They are not well-formed, or the header is larger than ``most``.
    """
    length = header_length(data[:PREFIX], len(data), most)
    return parse_header(data[PREFIX : PREFIX + length], len(data))


def _refuse_twins(pairs: list[tuple[str, Any]]) -> None:
    """JSON takes the last of two equal names in silence."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise HeaderError("a name is there twice", "duplicate-tensor")
