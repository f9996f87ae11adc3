"""Reads a backbone in Hugging Face format: every tensor that the graphs need, and no tensor left unexplained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.protocol.errors import ConfigError, PackError, UnsupportedBackboneError
from fleetune.edge.protocol.files import file_sha256, read_bytes
from fleetune.edge.protocol.header import BFLOAT16
from fleetune.tools.pack.architectures import ARCHITECTURES, LINEARS, Architecture, Geometry, int_field
from fleetune.tools.pack.compile import block_shapes

FloatArray = NDArray[np.float32]


WEIGHTS = "model.safetensors"
"""The only weight file that is read: it runs no code."""

MAX_SETTINGS = 1 << 20
"""Largest of its files of JSON in bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """A backbone's weights under their canonical names.

    Attributes:
        path: The folder it was read from.
        config: Its Hugging Face configuration.
        architecture: How it computes.
        geometry: Its sizes.
        blocks: For each block, canonical name → array.
        outer: The tensors around the blocks.
        sha256: Hash of the weight file, and of the number of its blocks where not all were read.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    geometry: Geometry
    blocks: list[dict[str, FloatArray]]
    outer: dict[str, FloatArray]
    sha256: str


def first_blocks(sha256: str, blocks: int) -> str:
    """What a backbone's first blocks are known by, which are a backbone of their own.

    Args:
        sha256: Hash of the weight file.
        blocks: How many they are.
    """
    return hashlib.sha256(f"{sha256}: {blocks} blocks".encode()).hexdigest()


def read_checkpoint(path: Path, *, image_size: int | None = None, blocks: int | None = None) -> Checkpoint:
    """Read ``config.json`` and ``model.safetensors`` of a folder.

    Args:
        path: A folder in Hugging Face format.
        image_size: Side of the pictures in pixels that a vision backbone is packed for; its own by default.
        blocks: How many of its blocks are read, from the input; all by default.

    Raises:
        ConfigError: It has fewer blocks.
        UnsupportedBackboneError: The architecture is unknown, or a tensor is missing, left over or of a wrong shape.
    """
    config = _read_config(path)
    model_type = str(config.get("model_type"))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedBackboneError(
            f"{path / 'config.json'}: field model_type: the architecture {model_type!r} is unknown",
            f"use a backbone of one of these: {', '.join(sorted(ARCHITECTURES))}",
        )
    activation = config.get("hidden_act")
    if activation != "gelu" or config.get("use_swiglu_ffn"):
        raise UnsupportedBackboneError(
            f"{path / 'config.json'}: field hidden_act: the activation {activation!r} is not supported",
            "use a backbone with the exact GELU",
        )
    patch = int_field(config, "patch_size") if architecture.modality == "image" else 1
    if image_size is not None and (architecture.modality != "image" or image_size < patch or image_size % patch):
        raise UnsupportedBackboneError(
            f"{path}: an image size of {image_size} does not fit this backbone",
            f"use a multiple of {patch} with a vision backbone, and no image size with a text backbone",
        )
    geometry = architecture.geometry(config, image_size)
    if blocks is not None and not 1 <= blocks <= geometry.blocks:
        raise ConfigError(f"--blocks: {blocks} is out of range", f"choose from 1 to {geometry.blocks}")
    weights = path / WEIGHTS
    if not weights.is_file():
        raise UnsupportedBackboneError(
            f"{path} has no {WEIGHTS}", "save the backbone with save_pretrained(safe_serialization=True)"
        )
    try:
        mapped = TensorFile(weights)
    except PackError as error:
        raise UnsupportedBackboneError(error.what, "copy it again, or save it again in float32 or float16") from error
    tensors = {key.removeprefix(f"{model_type}."): _numbers(mapped[key]) for key in mapped}
    shapes = block_shapes(architecture, geometry)
    outer_shapes = architecture.outer_shapes(config, geometry)
    read: list[dict[str, FloatArray]] = []
    for index in range(geometry.blocks):
        block = _take(tensors, architecture.block_keys(index), weights)
        _check_shapes(block, shapes, f"{weights}: block {index}")
        if blocks is None or index < blocks:
            read.append({name: np.array(array, dtype=np.float32, order="C") for name, array in block.items()})
    outer = _take(tensors, architecture.outer_keys(), weights)
    _check_shapes(outer, outer_shapes, str(weights))
    left = [key for key in tensors if not architecture.ignored(key)]
    if left:
        raise UnsupportedBackboneError(
            f"{weights} holds tensors that no {model_type} backbone has: {', '.join(left[:5])}",
            "use a plain backbone without further heads or adapters (merge them first)",
        )
    outer = {name: np.array(array, dtype=np.float32) for name, array in outer.items()}
    sha256 = file_sha256(weights)
    if len(read) < geometry.blocks:
        sha256 = first_blocks(sha256, len(read))
    return Checkpoint(
        path,
        config,
        architecture,
        replace(geometry, blocks=len(read)),
        read,
        architecture.prepare(outer, config, geometry),
        sha256,
    )


def _numbers(array: NDArray[Any]) -> FloatArray:
    """A tensor as it is mapped; bfloat16, which is the upper half of float32, is copied."""
    return (array.view("<u2").astype("<u4") << 16).view("<f4") if array.dtype == BFLOAT16 else array


def _check_shapes(tensors: Mapping[str, FloatArray], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, array in tensors.items():
        if array.shape != expected[name]:
            raise UnsupportedBackboneError(
                f"{where}: {name} has shape {array.shape}, expected {expected[name]}",
                "check that config.json belongs to these weights",
            )


def is_matrix(name: str) -> bool:
    """Whether a tensor of a block is one of the big matrices, which are stored quantised."""
    linear, _, kind = name.partition(".")
    return linear in LINEARS and kind == "weight"


def _take(tensors: dict[str, FloatArray], keys: Mapping[str, str], file: Path) -> dict[str, FloatArray]:
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise UnsupportedBackboneError(
            f"{file} lacks {len(missing)} tensors, the first is {missing[0]}",
            "check that config.json belongs to these weights; nothing is ever filled with random values",
        )
    return {name: tensors.pop(key) for key, name in keys.items()}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(read_bytes(file, MAX_SETTINGS))
    except OSError as error:
        raise UnsupportedBackboneError(
            f"{file} cannot be read: {error.strerror}", "name a folder in Hugging Face format"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedBackboneError(f"{file} is not JSON: {error}", "save the backbone again") from error
    if not isinstance(config, dict):
        raise UnsupportedBackboneError(f"{file} is not a JSON object", "save the backbone again")
    return config
