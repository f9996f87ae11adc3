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
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import MessageError

BLOCK = 64
"""Values that share a scale."""

SCALES = "scales"
"""Name of the tensor with the scales; no model's tensor is called so."""

FloatArray = NDArray[np.float32]
Parts = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


class Part(NamedTuple):
    """An array that travels.

    Attributes:
        dtype: Type of its values.
        shape: Its shape.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class NumberFormat(Protocol):
    """Turns float32 tensors into the arrays that travel, and back."""

    def layout(self, shapes: Shapes) -> dict[str, Part]:
        """The arrays that travel for tensors of these shapes."""
        ...

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """Tensors → arrays that travel."""
        ...

    def decode(self, parts: Parts, shapes: Shapes) -> dict[str, FloatArray]:
        """Arrays that travelled, which have the layout of these shapes → tensors.

        Raises:
            MessageError: A scale is not finite.
        """
        ...


class Floats:
    """Each value by itself.

    Args:
        dtype: The format of each.
    """

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self._dtype = np.dtype(dtype)

    def layout(self, shapes: Shapes) -> dict[str, Part]:
        """The same shapes in this format."""
        return {name: Part(self._dtype, shape) for name, shape in shapes.items()}

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """The same arrays in this format."""
        return {name: np.asarray(tensor, dtype=self._dtype, order="C") for name, tensor in tensors.items()}

    def decode(self, parts: Parts, shapes: Shapes) -> dict[str, FloatArray]:
        """The same arrays in float32."""
        return {name: parts[name].astype(np.float32, copy=False) for name in shapes}


class Integers:
    """Whole numbers with a scale for each block.

    Args:
        bits: 8, or 4: two values a byte, the first in the low half. A tensor with an odd last side stays in 8 bits.
        spread: Root mean squares of a block that its levels span at least.
    """

    def __init__(self, bits: int, spread: float = 0.0) -> None:
        self._bits, self._spread = bits, spread

    def layout(self, shapes: Shapes) -> dict[str, Part]:
        """An array of whole numbers for each tensor, and one of all scales."""
        parts = dict[str, Part]()
        for name, shape in shapes.items():
            if self._bits_of(shape) == 4:
                parts[name] = Part(np.dtype(np.uint8), (*shape[:-1], shape[-1] // 2))
            else:
                parts[name] = Part(np.dtype(np.int8), shape)
        return parts | {SCALES: Part(np.dtype(np.float16), (sum(map(_blocks, shapes.values())),))}

    def encode(self, tensors: Mapping[str, FloatArray]) -> Parts:
        """Rounded to the nearest step."""
        parts, scales = Parts(), list[NDArray[np.float16]]()
        for name in sorted(tensors):
            tensor = np.asarray(tensors[name], dtype=np.float32, order="C")
            bits = self._bits_of(tensor.shape)
            blocks = np.zeros((_blocks(tensor.shape), BLOCK), dtype=np.float32)
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

    def decode(self, parts: Parts, shapes: Shapes) -> dict[str, FloatArray]:
        """Whole numbers times their block's scale."""
        scales = parts[SCALES]
        check_finite(SCALES, scales)
        tensors, start = dict[str, FloatArray](), 0
        for name in sorted(shapes):
            shape, count = shapes[name], _blocks(shapes[name])
            size = math.prod(shape)
            values = np.zeros((count, BLOCK), dtype=np.float32)
            levels = _unpack(parts[name]) if self._bits_of(shape) == 4 else parts[name]
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


def _blocks(shape: tuple[int, ...]) -> int:
    """Blocks of values."""
    return -(-math.prod(shape) // BLOCK)


def _pack(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    halves = (levels + 8).astype(np.uint8)
    packed: NDArray[np.uint8] = halves[..., 0::2] | (halves[..., 1::2] << 4).astype(np.uint8)
    return packed


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    levels = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=np.int8)
    levels[..., 0::2] = packed & 15
    levels[..., 1::2] = packed >> 4
    levels -= 8
    return levels
