"""Writes a pack: quantises the weights, compiles the graphs, hashes every file, and moves the folder into place."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.pack.manifest import (
    FILE,
    SCHEMA,
    WEIGHTS_FILE,
    Backbone,
    Extractor,
    File,
    Image,
    Manifest,
    QuantisationType,
    Text,
)
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.wordpiece import MAX_VOCABULARY
from fleetune.edge.protocol.errors import ConfigError, RunFolderError, UnsupportedBackboneError
from fleetune.edge.protocol.files import file_sha256, read_bytes
from fleetune.tools.pack.architectures import LINEARS
from fleetune.tools.pack.checkpoint import MAX_SETTINGS, Checkpoint, is_matrix, read_checkpoint
from fleetune.tools.pack.compile import block_graphs, inference_graph, outer_graphs, suffix_graph
from fleetune.tools.pack.extractors import SHARED_CNN, DeepAveragingNetwork, Network
from fleetune.tools.pack.graph import OPSET
from fleetune.tools.pack.mixture import EXTRACTOR, GATE, extractor_graph, gate_graphs, mixture_graph
from fleetune.tools.pack.quantise import Stored, describe, quantise

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
    weights: QuantisationType = "nf4",
    blocks: int | None = None,
    extractor: bool = False,
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
        weights: How matrices are stored.
        blocks: How many of its blocks are packed, from the input; all by default.
        extractor: Whether the pack gets the graphs of an extractor that devices with other backbones share (pFedMoE).
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
    checkpoint = read_checkpoint(source, image_size=image_size, blocks=blocks)
    if not 1 <= rank <= checkpoint.geometry.width:
        raise ConfigError(f"--rank: {rank} is out of range", f"choose from 1 to {checkpoint.geometry.width}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        text, image = _inputs(checkpoint, folder, max_length)
        on_step("store the weights")
        _write_weights(checkpoint, folder / WEIGHTS_FILE, weights)
        on_step("compile the graphs")
        graphs = block_graphs(checkpoint.architecture, checkpoint.geometry, targets)
        graphs |= outer_graphs(checkpoint.architecture, checkpoint.geometry, targets, checkpoint.outer)
        whole = (checkpoint.architecture, checkpoint.geometry, targets, checkpoint.outer)
        for depth in range(checkpoint.geometry.blocks + 1):
            graphs[f"inference_{depth}"] = inference_graph(*whole, depth)
            if depth:
                graphs[f"suffix_{depth}"] = suffix_graph(*whole, depth)
        shared = extractor_of(checkpoint) if extractor else None
        if shared is not None:
            graphs |= gate_graphs(checkpoint.geometry.width, GATE) | {"extractor": extractor_graph(shared)}
            for depth in range(checkpoint.geometry.blocks + 1):
                graphs[f"mixture_{depth}"] = mixture_graph(*whole, shared, depth)
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
            quantisation=describe(weights),
            opset=OPSET,
            files={
                file.name: File(bytes=file.stat().st_size, sha256=file_sha256(file))
                for file in sorted(folder.iterdir())
            },
            text=text,
            image=image,
            extractor=None if shared is None else _describe(shared, checkpoint),
        )
        raw = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
        (folder / FILE).write_bytes(raw + b"\n")
        Pack.open(folder)
        folder.rename(out)
    return Pack.open(out, verify=False)


def extractor_of(checkpoint: Checkpoint) -> Network:
    """The network that devices share whose samples are such a backbone's."""
    if checkpoint.architecture.modality == "image":
        return SHARED_CNN
    return DeepAveragingNetwork(checkpoint.geometry.width)


def _describe(network: Network, checkpoint: Checkpoint) -> Extractor:
    """What the manifest says of a shared extractor."""
    table = checkpoint.outer.get("tokens.table")
    shapes = {f"{EXTRACTOR}{name}": shape for name, shape in network.shapes.items()}
    alike = [network.kind, network.representation, shapes]
    digest = hashlib.sha256(msgspec.json.encode(alike))
    if table is not None:
        digest.update(np.ascontiguousarray(table).tobytes())
        digest.update(read_bytes(checkpoint.path / "vocab.txt", MAX_VOCABULARY))
    return Extractor(network.kind, network.representation, GATE, shapes, digest.hexdigest())


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
    try:
        tokens = sum(1 for line in read_bytes(vocabulary, MAX_VOCABULARY).decode().split("\n") if line)
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedBackboneError(f"{vocabulary} cannot be read: {error}", "save the tokeniser again") from error
    if tokens > len(checkpoint.outer["tokens.table"]):
        raise UnsupportedBackboneError(
            f"{vocabulary} has {tokens} tokens, the weights have {len(checkpoint.outer['tokens.table'])}",
            "use the vocabulary that belongs to these weights",
        )
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    settings = checkpoint.path / "tokenizer_config.json"
    try:
        found = json.loads(read_bytes(settings, MAX_SETTINGS)) if settings.is_file() else {}
        lowercase = bool(found.get("do_lower_case", True))
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UnsupportedBackboneError(
            f"{settings} is not a JSON object: {error}", "save the tokeniser again"
        ) from error
    return Text(vocabulary="vocab.txt", lowercase=lowercase, max_length=max_length), None


def _write_weights(checkpoint: Checkpoint, file: Path, kind: QuantisationType) -> None:
    """Write one safetensors file; matrices are quantised, all else is float32."""
    import safetensors.numpy

    tensors: Stored = {}
    for index, block in enumerate(checkpoint.blocks):
        for name, array in block.items():
            full = f"blocks.{index}.{name}"
            tensors |= quantise(full, array, kind) if is_matrix(name) else {full: np.ascontiguousarray(array)}
    for name, array in checkpoint.outer.items():
        tensors |= quantise(name, array, kind) if name == "tokens.table" else {name: np.ascontiguousarray(array)}
    file.write_bytes(safetensors.numpy.save(tensors))
