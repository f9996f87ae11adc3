"""How a pack stores the matrices of a backbone."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.manifest import Quantisation, QuantisationType
from fleetune.edge.protocol.errors import UnsupportedBackboneError

FloatArray = NDArray[np.float32]
Stored = dict[str, NDArray[Any]]

BLOCK_SIZE = 64
"""Values that share one scale."""


def quantise(name: str, matrix: FloatArray, kind: QuantisationType) -> Stored:
    """Turn a matrix into what the weight file holds.

    Args:
        name: The matrix.
        matrix: Float32 [rows, columns]; ``columns`` is a multiple of the block size, so no scale spans two rows.
        kind: ``nf4`` quantises with bitsandbytes; ``int8`` stores ``round(127 x / absmax)``; ``fp32`` changes nothing.

    Returns:
        The matrix under its name, or codes and scales under ``NAME.codes`` and ``NAME.absmax``.
    """
    if kind == "fp32":
        return {name: np.ascontiguousarray(matrix)}
    rows, columns = matrix.shape
    if columns % BLOCK_SIZE:
        raise UnsupportedBackboneError(
            f"{name}: a matrix with {columns} columns cannot be quantised in blocks of {BLOCK_SIZE}",
            f"use a backbone whose width is a multiple of {BLOCK_SIZE}, or --weights fp32",
        )
    codes, absmax = _nf4(matrix) if kind == "nf4" else _int8(matrix)
    return {f"{name}.codes": codes.reshape(rows, -1), f"{name}.absmax": absmax.reshape(rows, columns // BLOCK_SIZE)}


def describe(kind: QuantisationType) -> Quantisation:
    """What the manifest says of the weights."""
    return Quantisation(type=kind, block_size=BLOCK_SIZE, code=_nf4_code() if kind == "nf4" else ())


def _int8(matrix: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    blocks = matrix.reshape(-1, BLOCK_SIZE)
    absmax = np.abs(blocks).max(axis=1)
    scale = np.divide(127, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return np.rint(blocks * scale[:, None]).astype(np.int8), absmax


def _nf4(matrix: FloatArray) -> tuple[NDArray[np.uint8], FloatArray]:
    packed, state = _bitsandbytes_nf4(matrix)
    return packed.numpy(), state.absmax.float().numpy()


def _nf4_code() -> tuple[float, ...]:
    """The sixteen values of a code (Dettmers et al. 2023, QLoRA, section 3), as bitsandbytes has them."""
    _, state = _bitsandbytes_nf4(np.zeros((1, BLOCK_SIZE), dtype=np.float32))
    return tuple(float(value) for value in state.code)


def _bitsandbytes_nf4(matrix: FloatArray) -> Any:
    import torch

    # It warns of a missing kernel for 4-bit inference, which nothing here runs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    tensor = torch.from_numpy(np.ascontiguousarray(matrix))
    return functional.quantize_4bit(tensor, blocksize=BLOCK_SIZE, quant_type="nf4")
