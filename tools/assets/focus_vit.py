"""Converts the saliency network of `focus-vit` to a Hugging Face format directory of its backbone.

The ONNX file was exported from `Dinov2Model` with a decoder behind it. Biases and normalisation weights kept
their names. Weights of matrix products are anonymous and stored as [inputs, outputs]; the position embeddings
are two anonymous constants. All of them are found by following the graph's edges from what has a name, and
the conversion is
strict: each initializer of the backbone is used once, each parameter of the model is filled, or nothing is
    written.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.edge.protocol.errors import AssetError, UnsupportedBackboneError

VERSION = 1
"""Counts the changes of what `convert` writes."""

ONNX_FILE = "vit_s_focus.onnx"
"""The carrier's file."""

INPUT_SIZE = 224
"""Height and width of the images, in pixels, that the network was exported and trained on for saliency."""

_PREFIX = "backbone."
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

FloatArray = npt.NDArray[np.float32]


@dataclass
class _Graph:
    """The part of an ONNX graph that computes the backbone's output, with its edges both ways.

    Attributes:
        weights: Initializers that this part reads, by their name in the file.
        producer: The node that makes a value, by the value's name.
        consumers: The nodes that read a value, by the value's name.
        taken: Names of the initializers that have become parameters.
    """

    weights: dict[str, FloatArray]
    producer: dict[str, Any]
    consumers: dict[str, list[Any]]
    taken: list[str] = field(default_factory=list)

    def take(self, name: str) -> FloatArray:
        """An initializer's values, and a note that they were used."""
        self.taken.append(name)
        return self.weights[name]

    def only_consumer(self, value: str, kind: str) -> Any:
        """The one node of type `kind` that reads `value`."""
        found = [node for node in self.consumers.get(value, []) if node.op_type == kind]
        if len(found) != 1:
            raise _unsupported(f"{value} is read by {len(found)} {kind} nodes, expected one")
        return found[0]

    def made_by(self, value: str, kind: str) -> Any:
        """The node of type `kind` that makes `value`."""
        node = self.producer.get(value)
        if node is None or node.op_type != kind:
            raise _unsupported(f"{value} is not made by a {kind} node")
        return node

    def constant(self, value: str) -> Any:
        """The array of a Constant node."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.made_by(value, "Constant").attribute[0].t)

    def is_constant(self, value: str) -> bool:
        """Whether `value` comes from a Constant node."""
        return value in self.producer and self.producer[value].op_type == "Constant"


def convert(source: Path, directory: Path) -> None:
    """Writes the backbone's `config.json`, `model.safetensors` and `preprocessor_config.json`.

    The position embeddings keep the size that they were trained at, 37 by 37 patches, so the configuration
    says images of 518 pixels. `Dinov2Model` interpolates them to the size of its input exactly as the ONNX
    graph does.

    Args:
        source: The ONNX file.
        directory: An existing folder.

    Raises:
        UnsupportedBackboneError: The graph is not the expected one, or a weight is left over or missing.
        AssetError: A library that converts is not installed.
        OSError: The source cannot be read or the directory not written.
    """
    try:
        import onnx
        import torch
        from safetensors.numpy import save
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise AssetError(
            f"focus-vit: {error.name} is needed to convert {ONNX_FILE} and is not installed",
            'run: pip install "fleetune[pack]"',
        ) from error
    try:
        onnx.checker.check_model(str(source))
    except onnx.checker.ValidationError as error:
        raise UnsupportedBackboneError(f"{source} is not a valid ONNX file: {error}", _REMEDY) from error
    graph = _backbone(onnx.load(source))
    tensors = _tensors(graph)
    _check_uses(graph)
    config = Dinov2Config(architectures=["Dinov2Model"], torch_dtype="float32", **_configuration(graph, tensors))
    with torch.device("meta"):  # only names and shapes are wanted
        expected = {name: tuple(value.shape) for name, value in Dinov2Model(config).state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        names = sorted(found.keys() | expected.keys())
        wrong = ", ".join(name for name in names if found.get(name) != expected.get(name))
        raise _unsupported(f"these parameters of Dinov2Model are missing, unknown or misshapen: {wrong}")
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(directory)
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": INPUT_SIZE, "width": INPUT_SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    text = json.dumps(preprocessing, indent=2) + "\n"
    (directory / "preprocessor_config.json").write_text(text, encoding="utf-8")


_REMEDY = "pass --backbone DIR with a Hugging Face format directory of a Dinov2Model"


def _unsupported(what: str) -> UnsupportedBackboneError:
    """An error about the graph."""
    return UnsupportedBackboneError(f"focus-vit: {what}", _REMEDY)


def _backbone(model: Any) -> _Graph:
    """Cuts the graph behind the last normalisation and keeps what leads there."""
    from onnx import numpy_helper

    producer = {output: node for node in model.graph.node for output in node.output}
    ends = [node for node in model.graph.node if f"{_PREFIX}layernorm.bias" in node.input]
    if len(ends) != 1:
        raise _unsupported(f"{_PREFIX}layernorm.bias is read by {len(ends)} nodes, expected one")
    nodes: dict[str, Any] = {}
    ahead = list(ends[0].output)
    while ahead:
        node = producer.get(ahead.pop())
        if node is not None and node.output[0] not in nodes:
            nodes[node.output[0]] = node
            ahead.extend(node.input)
    consumers: dict[str, list[Any]] = {}
    for node in nodes.values():
        for value in node.input:
            consumers.setdefault(value, []).append(node)
    initializers = [value for value in model.graph.initializer if value.name in consumers]
    weights = {value.name: numpy_helper.to_array(value) for value in initializers}
    kept = {output: node for node in nodes.values() for output in node.output}
    return _Graph(weights, kept, consumers)


def _tensors(graph: _Graph) -> dict[str, FloatArray]:
    """All parameters, by their names in `Dinov2Model`; matrix weights are [outputs, inputs]."""
    tensors = {"embeddings.position_embeddings": _positions(graph)}
    for name in sorted(graph.weights):
        if not name.startswith(_PREFIX):
            continue
        tensors[name.removeprefix(_PREFIX)] = graph.take(name)
        weight = name.removesuffix(".bias") + ".weight"
        if name.endswith(".bias") and weight not in graph.weights:
            tensors[weight.removeprefix(_PREFIX)] = _matrix(graph, name)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in sorted(tensors.items())}


def _matrix(graph: _Graph, bias: str) -> FloatArray:
    """The weight [outputs, inputs] of the product that a bias is added to."""
    addition = graph.only_consumer(bias, "Add")
    product = next(value for value in addition.input if value != bias)
    weight = graph.made_by(product, "MatMul").input[1]
    if weight not in graph.weights:
        raise _unsupported(f"the product before {bias} has no weight")
    return np.transpose(graph.take(weight))


def _positions(graph: _Graph) -> FloatArray:
    """The position embeddings [1, 1 + patches, width] at the size that they were trained at."""
    expand = graph.only_consumer(f"{_PREFIX}embeddings.cls_token", "Expand")
    tokens = graph.only_consumer(expand.output[0], "Concat")
    addition = graph.only_consumer(tokens.output[0], "Add")
    both = graph.made_by(next(value for value in addition.input if value != tokens.output[0]), "Concat")
    first, rest = both.input
    resized = False
    while rest in graph.producer:
        node = graph.producer[rest]
        if node.op_type not in ("Reshape", "Transpose", "Cast", "Resize"):
            raise _unsupported(f"the position embeddings pass through a {node.op_type} node")
        if node.op_type == "Resize":
            resized = True
            _check_resize(node)
        rest = node.input[0]
    if first not in graph.weights or rest not in graph.weights:
        raise _unsupported("the position embeddings are not constants")
    patches = graph.weights[rest].shape[1]
    if math.isqrt(patches) ** 2 != patches or not resized:
        raise _unsupported(f"the positions of {patches} patches are not a square that is resized")
    return np.concatenate([graph.take(first), graph.take(rest)], axis=1)


def _check_resize(node: Any) -> None:
    """Only the interpolation of `Dinov2Model` gives the same positions at another size."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    mode = attributes["mode"].s.decode()
    grid = attributes["coordinate_transformation_mode"].s.decode()
    curve = attributes["cubic_coeff_a"].f if "cubic_coeff_a" in attributes else None
    if mode != "cubic" or grid not in ("half_pixel", "pytorch_half_pixel") or curve != -0.75:
        raise _unsupported(f"the positions are resized by {mode}, {grid}, {curve}, expected bicubic")


def _check_uses(graph: _Graph) -> None:
    """Every initializer is read by one node and has become one parameter."""
    shared = sorted(name for name in graph.weights if len(graph.consumers[name]) != 1)
    if shared:
        raise _unsupported(f"these initializers are read more than once: {', '.join(shared)}")
    times = Counter(graph.taken)
    wrong = sorted(name for name in graph.weights if times[name] != 1)
    if wrong:
        raise _unsupported(f"these initializers were not used exactly once: {', '.join(wrong)}")


def _configuration(graph: _Graph, tensors: dict[str, FloatArray]) -> dict[str, Any]:
    """The arguments of `Dinov2Config`, read off the graph."""
    width, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    side = math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1)
    blocks = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})
    heads = {_heads(graph, block) for block in range(blocks)}
    scales = [name for name in graph.weights if "norm" in name and name.endswith(".weight")]
    epsilons = {_epsilon(graph, name) for name in scales}
    if len(heads) != 1 or len(epsilons) != 1:
        raise _unsupported(f"the blocks differ: heads {sorted(heads)}, epsilons {sorted(epsilons)}")
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads.pop(),
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "hidden_act": "gelu",
        "layer_norm_eps": epsilons.pop(),
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": False,  # only for pre-training; the export has none
    }


def _heads(graph: _Graph, block: int) -> int:
    """Attention heads of a block, once its scale is seen to be that of `Dinov2Model`."""
    scale = 1.0
    sizes = []
    for part in ("query", "key"):
        bias = f"{_PREFIX}encoder.layer.{block}.attention.attention.{part}.bias"
        value = graph.only_consumer(bias, "Add").output[0]
        reshape = graph.only_consumer(value, "Reshape")
        dimensions = graph.made_by(reshape.input[1], "Concat").input[-2:]
        sizes.append(tuple(int(graph.constant(dimension)[0]) for dimension in dimensions))
        transpose = graph.only_consumer(reshape.output[0], "Transpose")
        product = graph.only_consumer(transpose.output[0], "Mul")
        scale *= next(float(graph.constant(value)) for value in product.input if graph.is_constant(value))
    heads, head_width = sizes[0]
    if sizes[0] != sizes[1] or not math.isclose(scale, head_width**-0.5, rel_tol=1e-5):
        raise _unsupported(f"block {block} has heads of shape {sizes} and scale {scale}")
    return heads


def _epsilon(graph: _Graph, weight: str) -> float:
    """What a normalisation adds to the variance."""
    scaled = graph.only_consumer(weight, "Mul")
    division = graph.made_by(next(value for value in scaled.input if value != weight), "Div")
    root = graph.made_by(division.input[1], "Sqrt")
    addition = graph.made_by(root.input[0], "Add")
    value = next(float(graph.constant(value)) for value in addition.input if graph.is_constant(value))
    return float(f"{value:.6g}")  # float32 of 1e-6 is 9.99999997e-07
