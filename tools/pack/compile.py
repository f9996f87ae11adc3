"""Writes an architecture's graphs: what a device runs instead of torch.

One set of graphs serves every block and every depth, because weights and adapters are inputs of the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from fleetune.tools.pack.architectures import LINEARS, Architecture, BlockWeights, Geometry
from fleetune.tools.pack.graph import Graph, Shape, Tensor

SAVED = "saved"
"""Prefix of the tensors that ``block_forward_keep.onnx`` hands to ``block_backward_keep.onnx``."""


def _sizes(geometry: Geometry, name: str) -> tuple[int, int]:
    """(out, in) of a block's linear map."""
    if name == "fc1":
        return geometry.hidden, geometry.width
    if name == "fc2":
        return geometry.width, geometry.hidden
    return geometry.width, geometry.width


def block_shapes(architecture: Architecture, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every weight of one block."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in architecture.block_keys(0).values():
        linear, _, kind = name.partition(".")
        if linear in LINEARS:
            shapes[name] = _sizes(geometry, linear) if kind == "weight" else _sizes(geometry, linear)[:1]
        else:
            shapes[name] = (geometry.width,)
    return shapes


def block_graphs(architecture: Architecture, geometry: Geometry, targets: Sequence[str]) -> dict[str, onnx.ModelProto]:
    """Build the block's graphs.

    * ``block_forward``: h → y.
    * ``block_forward_keep``: h → y and the activations that the backward pass needs.
    * ``block_backward_keep``: those activations and the gradient of y → gradients of h and of the adapters.
    * ``block_backward``: the same gradients, recomputing the activations (gradient checkpointing: Chen et al. 2016).
    * ``…_bottom``: without the gradient of h, for the lowest active block, below which nothing learns.

    Args:
        architecture: How the backbone computes.
        geometry: Its sizes.
        targets: The linear maps that carry an adapter.

    Returns:
        File stem → model. ``h``, ``y`` and ``gradient`` are [b, t, d], ``mask`` [b, 1, t], A [in, r], B [r, out].
    """
    hidden: Shape = ("b", "t", geometry.width)
    h = Tensor("h", hidden)
    graph = Graph(sizes_from=h)
    mask = graph.input("mask", ("b", 1, "t"))
    upstream = graph.input("gradient", hidden)
    tensors = {name: graph.input(name, shape) for name, shape in block_shapes(architecture, geometry).items()}
    adapters = {
        name: (
            graph.input(f"{name}.A", (_sizes(geometry, name)[1], "r")),
            graph.input(f"{name}.B", ("r", _sizes(geometry, name)[0])),
        )
        for name in targets
    }
    learned = [tensor for pair in adapters.values() for tensor in pair]
    leaves = [h, mask, *tensors.values(), *learned]

    y = architecture.block(graph, h, mask, BlockWeights(tensors, adapters), geometry)
    forward_size = graph.size
    grad_h, *grads = graph.gradients(y, upstream, [h, *learned])
    of_adapters = {f"grad.{leaf.name}": grad for leaf, grad in zip(learned, grads, strict=True)}
    everything = {"grad.h": grad_h, **of_adapters}

    models = {
        "block_forward": graph.model("block_forward", leaves, {"y": y}),
        "block_backward": graph.model("block_backward", [*leaves, upstream], everything),
        "block_backward_bottom": graph.model("block_backward_bottom", [*leaves, upstream], of_adapters),
    }
    saved = graph.saved(everything.values(), forward_size, [*leaves, upstream])
    kept = {f"{SAVED}.{i}": tensor for i, tensor in enumerate(saved)}
    models["block_forward_keep"] = graph.model("block_forward_keep", leaves, {"y": y, **kept})
    for stem, outputs in (("block_backward_keep", everything), ("block_backward_keep_bottom", of_adapters)):
        model = graph.model(stem, [*leaves, upstream, *saved], outputs)
        models[stem] = _rename_inputs(model, {tensor.name: alias for alias, tensor in kept.items()})
    return models


def _rename_inputs(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    onnx.checker.check_model(model)
    return model


def outer_graphs(
    architecture: Architecture, geometry: Geometry, outer: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
) -> dict[str, onnx.ModelProto]:
    """Build what stands around the blocks.

    * ``embed``: a looked-up or patched sample [b, t, e] and ``positions`` [t, d] → h [b, t, d].
    * ``pool``: the last hidden state and the mask → features [b, d].
    * ``pool_backward``: the gradient of the features → the gradient of the hidden state.
    """
    columns = outer["patch.weight"].shape[1] if "patch.weight" in outer else geometry.width
    sample = Tensor("sample", ("b", "t", columns))
    graph = Graph(sizes_from=sample)
    symbols = {name: graph.input(name, value.shape) for name, value in outer.items() if not name.endswith(".table")}
    symbols["positions"] = graph.input("positions", ("t", geometry.width))
    embed = graph.model(
        "embed", [sample, *symbols.values()], {"h": architecture.embed(graph, sample, symbols, geometry)}
    )

    h = Tensor("h", ("b", "t", geometry.width))
    graph = Graph(sizes_from=h)
    mask = graph.input("mask", ("b", 1, "t"))
    upstream = graph.input("gradient", ("b", geometry.width))
    features = architecture.pool(graph, h, mask, symbols, geometry)
    inputs = [h, mask, upstream, *symbols.values()]
    (grad_h,) = graph.gradients(features, upstream, [h])
    return {
        "embed": embed,
        "pool": graph.model("pool", inputs, {"features": features}),
        "pool_backward": graph.model("pool_backward", inputs, {"grad.h": grad_h}),
    }
