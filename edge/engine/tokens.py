"""How the hidden state of a token is stored: as float16, or as int8 with a scale of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Records = NDArray[Any]
CodecName = Literal["f16", "int8"]


@dataclass(frozen=True)
class TokenCodec:
    """Hidden states ↔ fixed-size records, one a token.

    Attributes:
        record: Width d → type of a record.
        encode: Finite hidden states [n, d] → records [n]; what float16 cannot hold becomes infinite.
        decode: Records [n], and float32 [n, d] to write their hidden states into.
    """

    record: Callable[[int], np.dtype[Any]]
    encode: Callable[[FloatArray], Records]
    decode: Callable[[Records, FloatArray], None]


def _f16_record(width: int) -> np.dtype[Any]:
    return np.dtype([("values", "<f2", (width,))])


def _f16_encode(hidden: FloatArray) -> Records:
    records = np.empty(len(hidden), _f16_record(hidden.shape[1]))
    with np.errstate(over="ignore"):
        records["values"] = hidden
    return records


def _f16_decode(records: Records, out: FloatArray) -> None:
    np.copyto(out, records["values"])


def _int8_record(width: int) -> np.dtype[Any]:
    return np.dtype([("scale", "<f4"), ("values", "i1", (width,))])


def _int8_encode(hidden: FloatArray) -> Records:
    records = np.empty(len(hidden), _int8_record(hidden.shape[1]))
    scale = np.abs(hidden).max(axis=1) / np.float32(127)
    records["scale"] = scale
    records["values"] = np.rint(hidden / np.where(scale > 0, scale, 1)[:, None])
    return records


def _int8_decode(records: Records, out: FloatArray) -> None:
    np.copyto(out, records["values"])
    out *= records["scale"][:, None]


CODECS: Mapping[CodecName, TokenCodec] = {
    "f16": TokenCodec(_f16_record, _f16_encode, _f16_decode),
    "int8": TokenCodec(_int8_record, _int8_encode, _int8_decode),
}
"""``f16``: 2 d bytes a token, each value within 2⁻¹¹ of itself (2⁻²⁵ near zero), up to 65504.
``int8``: d + 4 bytes a token, each value within 1/254 of the token's largest (scale: absmax / 127), of any range."""
