"""Writes a pack: quantises the weights, compiles the graphs, hashes every file, and moves the folder into place."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.manifest import FILE, SCHEMA, WEIGHTS_FILE, Backbone, File, Image, Manifest, Quantisation, Text
from fleetune.edge.pack.pack import Pack, file_sha256
from fleetune.edge.protocol.errors import ConfigError, RunFolderError, UnsupportedBackboneError
from fleetune.tools.pack.architectures import LINEARS
from fleetune.tools.pack.checkpoint import Checkpoint, is_matrix, read_checkpoint
from fleetune.tools.pack.compile import block_graphs, outer_graphs, suffix_graph
from fleetune.tools.pack.graph import OPSET

BLOCK_SIZE = 64
"""Values that share one NF4 scale."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def write_pack(
    source: Path,
    out: Path,
    *,
    name: str,
    licence: str,
    origin: str,
    rank: int = 8,
    targets: Sequence[str] = ("query", "value"),
    max_length: int = 64,
    image_size: int | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Pack:
    """Compile the backbone in ``source`` into a pack at ``out``.

    The folder appears whole or not at all.

    Args:
        source: A folder in Hugging Face format.
        out: Where the pack goes; must not exist.
        name: Name of the backbone.
        licence: Licence of its weights.
        origin: Where they come from, for people.
        rank: Rank r of the adapters.
        targets: Linear maps of a block that carry an adapter.
        max_length: Longest text in tokens.
        image_size: Side of the pictures in pixels, a multiple of the patch.
        on_step: Is told what happens next.

    Raises:
        ConfigError: The rank or a target is not possible.
        RunFolderError: ``out`` exists.
        UnsupportedBackboneError: The backbone cannot be packed.
    """
    unknown = [target for target in targets if target not in LINEARS]
    if unknown or not targets:
        raise ConfigError(f"--targets: {', '.join(unknown) or 'none'} given", f"choose from {', '.join(LINEARS)}")
    if out.exists():
        raise RunFolderError(f"{out} exists", "name another folder, or delete it first")
    on_step("read the backbone")
    checkpoint = read_checkpoint(source, image_size=image_size)
    if not 1 <= rank <= checkpoint.geometry.width:
        raise ConfigError(f"--rank: {rank} is out of range", f"choose from 1 to {checkpoint.geometry.width}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        text, image = _inputs(checkpoint, folder, max_length)
        on_step("quantise the weights")
        code = _write_weights(checkpoint, folder / WEIGHTS_FILE)
        on_step("compile the graphs")
        graphs = block_graphs(checkpoint.architecture, checkpoint.geometry, targets)
        graphs |= outer_graphs(checkpoint.architecture, checkpoint.geometry, targets, checkpoint.outer)
        for depth in range(1, checkpoint.geometry.blocks + 1):
            graphs[f"suffix_{depth}"] = suffix_graph(
                checkpoint.architecture, checkpoint.geometry, targets, checkpoint.outer, depth
            )
        for stem, model in graphs.items():
            (folder / f"{stem}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        geometry = checkpoint.geometry
        sizes = {target: checkpoint.blocks[0][f"{target}.weight"].shape for target in targets}
        manifest = Manifest(
            schema=SCHEMA,
            kit=version("fleetune"),
            backbone=Backbone(
                id=name,
                architecture=str(checkpoint.config["model_type"]),
                sha256=checkpoint.sha256,
                licence=licence,
                source=origin,
            ),
            blocks=geometry.blocks,
            width=geometry.width,
            heads=geometry.heads,
            epsilon=geometry.epsilon,
            rank=rank,
            targets={target: (size[1], size[0]) for target, size in sizes.items()},
            quantisation=Quantisation(type="nf4", block_size=BLOCK_SIZE, code=tuple(code)),
            opset=OPSET,
            files={
                file.name: File(bytes=file.stat().st_size, sha256=file_sha256(file))
                for file in sorted(folder.iterdir())
            },
            text=text,
            image=image,
        )
        raw = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
        (folder / FILE).write_bytes(raw + b"\n")
        Pack.open(folder)
        folder.rename(out)
    return Pack.open(out, verify=False)


def _inputs(checkpoint: Checkpoint, folder: Path, max_length: int) -> tuple[Text | None, Image | None]:
    config = checkpoint.config
    if checkpoint.architecture.modality == "image":
        side = int(checkpoint.geometry.length - 1) ** 0.5 * int(config["patch_size"])
        image = Image(size=round(side), patch=int(config["patch_size"]), mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        return None, image
    if not 2 < max_length <= checkpoint.geometry.length:
        raise ConfigError(
            f"--max-length: {max_length} is out of range", f"choose from 3 to {checkpoint.geometry.length}"
        )
    vocabulary = checkpoint.path / "vocab.txt"
    if not vocabulary.is_file():
        raise UnsupportedBackboneError(
            f"{checkpoint.path} has no vocab.txt", "use a backbone with a WordPiece vocabulary"
        )
    tokens = sum(1 for line in vocabulary.read_text(encoding="utf-8").split("\n") if line)
    if tokens > len(checkpoint.outer["tokens.table"]):
        raise UnsupportedBackboneError(
            f"{vocabulary} has {tokens} tokens, the weights have {len(checkpoint.outer['tokens.table'])}",
            "use the vocabulary that belongs to these weights",
        )
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    settings = checkpoint.path / "tokenizer_config.json"
    try:
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        lowercase = bool(found.get("do_lower_case", True))
    except (ValueError, AttributeError) as error:
        raise UnsupportedBackboneError(
            f"{settings} is not a JSON object: {error}", "save the tokeniser again"
        ) from error
    return Text(vocabulary="vocab.txt", lowercase=lowercase, max_length=max_length), None


def _write_weights(checkpoint: Checkpoint, file: Path) -> list[float]:
    """Quantise with bitsandbytes and write one safetensors file; returns the sixteen values of the NF4 code."""
    import safetensors.numpy

    tensors: dict[str, NDArray[np.generic]] = {}
    code: list[float] = []

    def add(name: str, array: NDArray[np.float32], *, matrix: bool) -> None:
        if not matrix:
            tensors[name] = np.ascontiguousarray(array)
            return
        packed, scales, code[:] = quantise(array)
        tensors[f"{name}.codes"] = packed
        tensors[f"{name}.absmax"] = scales

    for index, block in enumerate(checkpoint.blocks):
        for name, array in block.items():
            add(f"blocks.{index}.{name}", array, matrix=is_matrix(name))
    for name, array in checkpoint.outer.items():
        add(name, array, matrix=name == "tokens.table")
    file.write_bytes(safetensors.numpy.save(tensors))
    return code


def quantise(matrix: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], list[float]]:
    """Quantise a matrix to NF4 with bitsandbytes.

    Args:
        matrix: Float32 [rows, columns]; ``columns`` is a multiple of the block size, so no scale spans two rows.

    Returns:
        Codes uint8 [rows, columns / 2], scales float32 [rows, columns / block size], and the code's 16 values.
    """
    import torch

    # It warns of a missing kernel for 4-bit inference, which nothing here runs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    rows, columns = matrix.shape
    if columns % BLOCK_SIZE:
        raise UnsupportedBackboneError(
            f"a matrix with {columns} columns cannot be quantised in blocks of {BLOCK_SIZE}",
            f"use a backbone whose width is a multiple of {BLOCK_SIZE}",
        )
    packed, state = functional.quantize_4bit(
        torch.from_numpy(np.ascontiguousarray(matrix)), blocksize=BLOCK_SIZE, quant_type="nf4"
    )
    return (
        packed.numpy().reshape(rows, columns // 2),
        state.absmax.float().numpy().reshape(rows, columns // BLOCK_SIZE),
        [float(value) for value in state.code],
    )
