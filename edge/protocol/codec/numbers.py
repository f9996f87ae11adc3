"""Number formats: what becomes of float32 values on their way.

``int8`` and ``int4`` are symmetric: each block of 64 values, in row-major order, shares one float16 scale, the largest
magnitude over 127 or 7. The scales of all tensors, in the order of their names, travel as one more tensor.

``int4`` takes a coarser scale where no value stands out: five times the root mean square over 7. Most values are then
one of few, which an entropy coder turns into far fewer bits than four; for such a coder steps of equal size are close
to the best that there is (Gish and Pierce, 1968). What is lost comes with the next update, by error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import MessageError

BLOCK = 64
"""Values that share a scale."""

SCALES = "scales"
"""Name of the tensor with the scales; no model's tensor is called so."""

FloatArray = NDArray[np.float32]
Parts = dict[str, NDArray[Any]]


class NumberFormat(Protocol):
    """Turns float32 tensors into the arrays that travel, and back."""

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """Tensors → arrays that travel."""
        ...

    def decode(self, parts: Parts) -> dict[str, FloatArray]:
        """Arrays that travelled → tensors.

        Raises:
            MessageError: An array is not of this format.
        """
        ...


class Floats:
    """Each value by itself.

    Args:
        dtype: The format of each.
    """

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self._dtype = np.dtype(dtype)

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """The same arrays in this format."""
        return {name: np.asarray(tensor, dtype=self._dtype, order="C") for name, tensor in tensors.items()}

    def decode(self, parts: Parts) -> dict[str, FloatArray]:
        """The same arrays in float32."""
        for name, part in parts.items():
            _check_dtype(name, part, self._dtype)
        return {name: part.astype(np.float32, copy=False) for name, part in parts.items()}


class Integers:
    """Whole numbers with a scale for each block.

    Args:
        bits: 8, or 4: two values a byte, the first in the low half. A tensor with an odd last side stays in 8 bits.
        spread: Root mean squares of a block that its levels span at least.
    """

    def __init__(self, bits: int, spread: float = 0.0) -> None:
        self._bits, self._spread = bits, spread

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """Rounded to the nearest step."""
        parts, scales = Parts(), list[NDArray[np.float16]]()
        for name in sorted(tensors):
            tensor = np.asarray(tensors[name], dtype=np.float32, order="C")
            bits = self._bits_of(tensor.shape)
            blocks = np.zeros((-(-tensor.size // BLOCK), BLOCK), dtype=np.float32)
            blocks.reshape(-1)[: tensor.size] = tensor.reshape(-1)
            most = 2 ** (bits - 1) - 1
            with np.errstate(over="ignore"):  # found by whoever decodes: an infinite scale is refused
                span = np.abs(blocks).max(axis=1)
                if bits == self._bits and self._spread:
                    span = np.maximum(span, self._spread * np.sqrt(np.square(blocks).mean(axis=1)))
                scale = (span / most).astype(np.float16)
            step = scale.astype(np.float32)[:, None]
            whole = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
            levels = np.clip(np.rint(whole), -most, most).astype(np.int8).reshape(-1)[: tensor.size]
            parts[name] = _pack(levels.reshape(tensor.shape)) if bits == 4 else levels.reshape(tensor.shape)
            scales.append(scale)
        return parts | {SCALES: np.concatenate([np.zeros(0, np.float16), *scales])}

    def decode(self, parts: Parts) -> dict[str, FloatArray]:
        """Whole numbers times their block's scale."""
        scales = parts.get(SCALES)
        if scales is None:
            raise MessageError("the payload has no scales", "encode it again", reason="malformed")
        _check_dtype(SCALES, scales, np.dtype(np.float16))
        check_finite(SCALES, scales)
        names = sorted(set(parts) - {SCALES})
        for name in names:
            packed = parts[name].dtype == np.uint8 and self._bits == 4
            _check_dtype(name, parts[name], np.dtype(np.uint8 if packed else np.int8))
        shapes = {name: _unpacked(parts[name]) for name in names}  # of int4, up to twice the values of its part
        counts = [-(-math.prod(shape) // BLOCK) for shape in shapes.values()]
        if scales.shape != (sum(counts),):
            raise MessageError(
                f"{scales.size} scales for {sum(counts)} blocks of values", "encode it again", reason="malformed"
            )
        tensors, start = dict[str, FloatArray](), 0
        for (name, shape), count in zip(shapes.items(), counts, strict=True):
            size = math.prod(shape)
            values = np.zeros((count, BLOCK), dtype=np.float32)
            levels = parts[name] if parts[name].dtype == np.int8 else _unpack(parts[name])
            values.reshape(-1)[:size] = levels.reshape(-1)
            values *= scales[start : start + count].astype(np.float32)[:, None]
            tensors[name] = values.reshape(-1)[:size].reshape(shape)
            start += count
        return tensors

    def _bits_of(self, shape: tuple[int, ...]) -> int:
        return 4 if self._bits == 4 and shape and shape[-1] % 2 == 0 else 8


def check_finite(name: str, tensor: NDArray[Any]) -> None:
    """Refuse what no training may leave behind.

    Raises:
        MessageError: The tensor holds NaN or infinity.
    """
    if not np.isfinite(tensor).all():
        raise MessageError(
            f"tensor {name} holds values that are not finite", "train with a lower rate", reason="not-finite"
        )


def _check_dtype(name: str, part: NDArray[Any], expected: np.dtype[Any]) -> None:
    if part.dtype != expected:
        raise MessageError(
            f"tensor {name} is {part.dtype}, the codec says {expected}", "encode it again", reason="wrong-dtype"
        )


def _unpacked(part: NDArray[Any]) -> tuple[int, ...]:
    """Shape of the values."""
    return (*part.shape[:-1], 2 * part.shape[-1]) if part.dtype == np.uint8 and part.shape else part.shape


def _pack(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    halves = (levels + 8).astype(np.uint8)
    packed: NDArray[np.uint8] = halves[..., 0::2] | (halves[..., 1::2] << 4).astype(np.uint8)
    return packed


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    levels = np.empty(_unpacked(packed), dtype=np.int8)
    levels[..., 0::2] = packed & 15
    levels[..., 1::2] = packed >> 4
    levels -= 8
    return levels
