"""Tensors ↔ bytes: safetensors in a named number format. Never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_PAYLOAD

CODECS: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16}
"""Name → number format of every tensor in the payload."""


def encode_tensors(tensors: Mapping[str, NDArray[Any]], codec: str) -> bytes:
    """Encode named tensors."""
    dtype = CODECS[codec]
    data: bytes = safetensors.numpy.save({name: np.ascontiguousarray(a, dtype=dtype) for name, a in tensors.items()})
    return data


def decode_tensors(data: bytes, codec: str) -> dict[str, NDArray[np.float32]]:
    """Decode to float32.

    Raises:
        MessageError: The codec is unknown, the bytes are malformed, or a value is not finite.
    """
    if codec not in CODECS:
        raise MessageError(f"the codec {codec!r} is unknown", f"use one of {', '.join(CODECS)}", reason="unknown-codec")
    if len(data) > MAX_PAYLOAD:
        raise MessageError(f"a payload of {len(data)} bytes", f"send at most {MAX_PAYLOAD}", reason="payload-too-large")
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise MessageError(f"not a safetensors payload: {error}", "encode it again", reason="malformed") from error
    expected = np.dtype(CODECS[codec])
    for name, tensor in tensors.items():
        if tensor.dtype != expected:
            raise MessageError(
                f"tensor {name} is {tensor.dtype}, the codec says {expected}", "encode it again", reason="wrong-dtype"
            )
        if not np.isfinite(tensor).all():
            raise MessageError(
                f"tensor {name} holds values that are not finite", "train with a lower rate", reason="not-finite"
            )
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
