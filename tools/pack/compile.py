"""Writes an architecture's graphs: what a device runs instead of torch.

Weights and adapters are inputs of the graphs, so one set of block graphs serves every block; a fused step has a
graph for each depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from fleetune.tools.pack.architectures import LINEARS, Architecture, BlockWeights, Geometry
from fleetune.tools.pack.graph import Graph, Shape, Tensor

Outer = Mapping[str, NDArray[np.float32]]
"""The tensors around the blocks: canonical name → values."""


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


def _block_weights(
    graph: Graph, architecture: Architecture, geometry: Geometry, targets: Sequence[str], prefix: str = ""
) -> BlockWeights:
    """One block's weights and adapters, A [in, r] and B [r, out], as inputs."""
    tensors = {
        name: graph.input(f"{prefix}{name}", shape) for name, shape in block_shapes(architecture, geometry).items()
    }
    adapters = {}
    for name in targets:
        rows, columns = _sizes(geometry, name)
        pair = graph.input(f"{prefix}{name}.A", (columns, "r")), graph.input(f"{prefix}{name}.B", ("r", rows))
        adapters[name] = pair
    return BlockWeights(tensors, adapters)


def block_graphs(architecture: Architecture, geometry: Geometry, targets: Sequence[str]) -> dict[str, onnx.ModelProto]:
    """Build the block's graphs, which serve every block.

    * ``block_forward``: h → y.
    * ``block_backward``: h and the gradient of y → gradients of h and of the adapters, recomputing the activations
      (gradient checkpointing: Chen et al. 2016).
    * ``block_backward_bottom``: without the gradient of h, for the lowest active block, below which nothing learns.

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
    weights = _block_weights(graph, architecture, geometry, targets)
    learned, leaves = weights.learned, [h, mask, *weights.inputs]

    y = architecture.block(graph, h, mask, weights, geometry)
    grad_h, *grads = graph.gradients(y, upstream, [h, *learned])
    of_adapters = {f"grad.{leaf.name}": grad for leaf, grad in zip(learned, grads, strict=True)}
    return {
        "block_forward": graph.model("block_forward", leaves, {"y": y}),
        "block_backward": graph.model("block_backward", [*leaves, upstream], {"grad.h": grad_h, **of_adapters}),
        "block_backward_bottom": graph.model("block_backward_bottom", [*leaves, upstream], of_adapters),
    }


def suffix_graph(
    architecture: Architecture, geometry: Geometry, targets: Sequence[str], outer: Outer, depth: int
) -> onnx.ModelProto:
    """Build a whole training step of the top ``depth`` blocks: forward, head, loss and backward, nothing recomputed.

    Inputs are ``h`` [b, t, d] at the boundary, ``mask`` [b, 1, t], ``labels`` [b, c] (one-hot), ``head.weight`` [d, c],
    ``head.bias`` [c], and the weights and adapters of each block as ``0.query.weight`` and so on, 0 being the lowest
    active block. Outputs are ``features`` [b, d], ``logits`` [b, c], and the gradients of the summed cross-entropy:
    ``grad.head.weight``, ``grad.head.bias``, ``grad.0.query.A`` and so on.
    """
    h = Tensor("h", ("b", "t", geometry.width))
    graph = Graph(sizes_from=h)
    mask, labels = graph.input("mask", ("b", 1, "t")), graph.input("labels", ("b", "c"))
    head, bias = graph.input("head.weight", (geometry.width, "c")), graph.input("head.bias", ("c",))
    blocks = top_blocks(graph, architecture, geometry, targets, outer, h, mask, depth)
    logits = graph.gemm(blocks.features, head, bias)
    slope = graph.sub(graph.softmax(logits), labels)  # gradient of the summed cross-entropy
    wrt = [head, bias, *blocks.learned]
    outputs = {"features": blocks.features, "logits": logits}
    outputs |= {f"grad.{leaf.name}": one for leaf, one in zip(wrt, graph.gradients(logits, slope, wrt), strict=True)}
    return graph.model(f"suffix_{depth}", [h, mask, labels, head, bias, *blocks.leaves], outputs)


@dataclass(frozen=True)
class TopBlocks:
    """The top blocks of a backbone in a graph.

    Attributes:
        features: What comes out [b, d].
        learned: The adapters' tensors.
        leaves: Those, the frozen weights, and the tensors around the blocks.
    """

    features: Tensor
    learned: list[Tensor]
    leaves: list[Tensor]


def top_blocks(
    graph: Graph,
    architecture: Architecture,
    geometry: Geometry,
    targets: Sequence[str],
    outer: Outer,
    h: Tensor,
    mask: Tensor,
    depth: int,
) -> TopBlocks:
    """Record the top ``depth`` blocks, one or more; the inputs of the lowest are ``0.query.weight`` and so on."""
    symbols = _outer_symbols(graph, outer)
    leaves, learned, hidden = [*symbols.values()], list[Tensor](), h
    for index in range(depth):
        weights = _block_weights(graph, architecture, geometry, targets, f"{index}.")
        leaves += weights.inputs
        learned += weights.learned
        if index < depth - 1:
            hidden = architecture.block(graph, hidden, mask, weights, geometry)
    return TopBlocks(architecture.top(graph, hidden, mask, weights, symbols, geometry), learned, leaves)


def inference_graph(
    architecture: Architecture, geometry: Geometry, targets: Sequence[str], outer: Outer, depth: int
) -> onnx.ModelProto:
    """Build a whole forward pass that two experts share up to the top ``depth`` blocks, which run once for each.

    Inputs are ``sample`` [b, t, e], ``positions`` [t, d], ``mask`` [b, 1, t], and the adapters of the top blocks, those
    of both experts in one tensor: ``4.query.A`` [2, in, r] and so on, 4 being the block. Weights are given when the
    graph is opened (``4.query.weight``), so that the runtime can arrange them for its products. Outputs are
    ``features`` [2 b, d], the first expert's before the second's, or [b, d] at depth 0; and ``pooled.3``, the mean over
    real tokens of the hidden states before block 3 and likewise for each block: [b, d] as far as both experts share it.
    """
    sample = Tensor("sample", ("b", "t", _sample_width(outer, geometry)))
    graph = Graph(sizes_from=sample)
    mask, positions = graph.input("mask", ("b", 1, "t")), graph.input("positions", ("t", geometry.width))
    symbols = {name: graph.weight(name, value.shape) for name, value in outer.items() if not name.endswith(".table")}
    hidden = architecture.embed(graph, sample, {**symbols, "positions": positions}, geometry)
    leaves, outputs = [sample, mask, positions], dict[str, Tensor]()
    for block in range(geometry.blocks):
        boundary = geometry.blocks - depth
        share = graph.div(mask, graph.sum(mask, -1))
        outputs[f"pooled.{block}"] = graph.reshape(graph.matmul(share, hidden), ("b", geometry.width))
        if block == boundary:
            hidden, mask = graph.twice(hidden), graph.twice(mask)
            graph.sizes_from = hidden
        tensors = {
            name: graph.weight(f"{block}.{name}", shape) for name, shape in block_shapes(architecture, geometry).items()
        }
        adapters = {}
        for name in targets if block >= boundary else ():
            rows, columns = _sizes(geometry, name)
            pair = Tensor(f"{block}.{name}.A", (2, columns, "r")), Tensor(f"{block}.{name}.B", (2, "r", rows))
            adapters[name] = pair
            leaves += pair
        weights = BlockWeights(tensors, adapters)
        if block < geometry.blocks - 1:
            hidden = architecture.block(graph, hidden, mask, weights, geometry)
        else:
            outputs["features"] = architecture.top(graph, hidden, mask, weights, symbols, geometry)
    return graph.model(f"inference_{depth}", leaves, outputs)


def _sample_width(outer: Outer, geometry: Geometry) -> int:
    """Width of what is embedded: a patch's pixels, or a row of the token table."""
    return int(outer["patch.weight"].shape[1]) if "patch.weight" in outer else geometry.width


def _outer_symbols(graph: Graph, outer: Outer) -> dict[str, Tensor]:
    return {name: graph.input(name, value.shape) for name, value in outer.items() if not name.endswith(".table")}


def outer_graphs(
    architecture: Architecture, geometry: Geometry, targets: Sequence[str], outer: Outer
) -> dict[str, onnx.ModelProto]:
    """Build what stands around the blocks.

    * ``embed``: a looked-up or patched sample [b, t, e] and ``positions`` [t, d] → h [b, t, d].
    * ``top``: h before the last block → features [b, d], without what they do not depend on.
    * ``pool``: the last hidden state and the mask → features [b, d].
    * ``pool_backward``: the gradient of the features → the gradient of the hidden state.
    """
    sample = Tensor("sample", ("b", "t", _sample_width(outer, geometry)))
    graph = Graph(sizes_from=sample)
    symbols = _outer_symbols(graph, outer)
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
    weights = _block_weights(graph, architecture, geometry, targets)
    top = architecture.top(graph, h, mask, weights, symbols, geometry)
    leaves = [h, mask, *symbols.values(), *weights.inputs]
    return {
        "embed": embed,
        "top": graph.model("top", leaves, {"features": top}),
        "pool": graph.model("pool", inputs, {"features": features}),
        "pool_backward": graph.model("pool_backward", inputs, {"grad.h": grad_h}),
    }
