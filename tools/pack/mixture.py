"""Writes the graphs of pFedMoE: the shared extractor, the gate, and a training step of the mixture.

``R = α_G · G(x; θ) + α_F · F(x; ω)`` goes through the private header, and ``(α_G, α_F)`` comes from the private gate,
for each sample (Yi et al., 2024, equations 2 to 4). θ, ω and the header are trained by one graph, to which α is an
input; the gate has graphs of its own. So α can be forced, and where a device is short of memory and a batch goes
through the mixture in parts, the gate still sees the whole batch, over which it normalises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from fleetune.edge.methods.pfedmoe.gate import RUNNING, gate_shapes, running_shapes
from fleetune.tools.pack.architectures import Architecture, Geometry
from fleetune.tools.pack.compile import Outer, top_blocks
from fleetune.tools.pack.extractors import Network
from fleetune.tools.pack.graph import Graph, Tensor

EPSILON = 1e-5
"""Added to variances, as in torch."""

EXTRACTOR, BODY = "extractor.", "body."
"""What the names of a shared extractor's tensors begin with, and those of a private network's."""

GATE = 128
"""Width of a gate's hidden layer."""

ALPHAS = ("alpha.global", "alpha.local")

_PICKS = np.eye(2, dtype=np.float32)[:, :, None]


def gate_graphs(inputs: int, hidden: int) -> dict[str, onnx.ModelProto]:
    """Build the gate: switchable normalisation, linear map, batch normalisation, sigmoid, and once more, softmax.

    * ``gate_train``: ``x`` [b, inputs] → ``alpha`` [b, 2], normalised over this batch, and the batch's means and biased
      variances: ``switch.mean`` [1, inputs], ``switch.variance`` and so on.
    * ``gate_backward``: ``x`` and ``gradient``, that of ``alpha`` → the gradients of all that a gate learns.
    * ``gate``: ``x`` and running means and variances → ``alpha``.
    """
    x = Tensor("x", ("b", inputs))
    graph = Graph(sizes_from=x)
    upstream = graph.input("gradient", ("b", 2))
    learned = {name: graph.input(name, shape) for name, shape in gate_shapes(inputs, hidden).items()}
    running = {name: graph.input(f"{RUNNING}{name}", shape) for name, shape in running_shapes(inputs, hidden).items()}
    found: dict[str, Tensor] = {}

    def of_batch(norm: str, a: Tensor) -> tuple[Tensor, Tensor]:
        pair = found[f"{norm}.mean"], found[f"{norm}.variance"] = _moments(graph, a, 0)
        return pair

    def kept(norm: str, _a: Tensor) -> tuple[Tensor, Tensor]:
        return running[f"{norm}.mean"], running[f"{norm}.variance"]

    alpha = _gate(graph, x, learned, of_batch)
    gradients = graph.gradients(alpha, upstream, list(learned.values()))
    leaves = [x, *learned.values()]
    return {
        "gate_train": graph.model("gate_train", leaves, {"alpha": alpha, **found}),
        "gate_backward": graph.model(
            "gate_backward",
            [*leaves, upstream],
            {f"grad.{name}": one for name, one in zip(learned, gradients, strict=True)},
        ),
        "gate": graph.model("gate", [*leaves, *running.values()], {"alpha": _gate(graph, x, learned, kept)}),
    }


_Moments = Callable[[str, Tensor], tuple[Tensor, Tensor]]


def _gate(graph: Graph, x: Tensor, tensors: Mapping[str, Tensor], moments: _Moments) -> Tensor:
    """``alpha`` [b, 2]; normalised before the softmax, or its rows would not sum to 1."""
    switched = _switch_norm(graph, x, tensors, moments)
    hidden = graph.gemm(switched, tensors["gate.fc1.weight"], tensors["gate.fc1.bias"])
    hidden = graph.unary("Sigmoid", _batch_norm(graph, hidden, "norm1", tensors, moments))
    scores = graph.gemm(hidden, tensors["gate.fc2.weight"], tensors["gate.fc2.bias"])
    return graph.softmax(_batch_norm(graph, scores, "norm2", tensors, moments))


def _moments(graph: Graph, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    mean = graph.mean(x, axis)
    centred = graph.sub(x, mean)
    return mean, graph.mean(graph.mul(centred, centred), axis)


def _normalised(
    graph: Graph, x: Tensor, mean: Tensor, variance: Tensor, name: str, tensors: Mapping[str, Tensor]
) -> Tensor:
    normal = graph.div(graph.sub(x, mean), graph.unary("Sqrt", graph.add(variance, EPSILON)))
    return graph.add(graph.mul(normal, tensors[f"gate.{name}.weight"]), tensors[f"gate.{name}.bias"])


def _batch_norm(graph: Graph, x: Tensor, name: str, tensors: Mapping[str, Tensor], moments: _Moments) -> Tensor:
    """Batch normalisation (Ioffe and Szegedy, 2015)."""
    return _normalised(graph, x, *moments(name, x), name, tensors)


def _switch_norm(graph: Graph, x: Tensor, tensors: Mapping[str, Tensor], moments: _Moments) -> Tensor:
    """Switchable normalisation (Luo et al., 2019, equation 3) of vectors: over the features, and over the batch."""
    (mean_ln, variance_ln), (mean_bn, variance_bn) = _moments(graph, x, 1), moments("switch", x)
    mixed = [
        _weighted(graph, tensors[f"gate.switch.{what}_weight"], over_features, over_batch)
        for what, over_features, over_batch in (("mean", mean_ln, mean_bn), ("variance", variance_ln, variance_bn))
    ]
    return _normalised(graph, x, mixed[0], mixed[1], "switch", tensors)


def _weighted(graph: Graph, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``w₁ · first + w₂ · second`` with ``w = softmax(weights)``."""
    both = graph.reshape(graph.softmax(weights), (1, 2))
    one, other = (graph.gemm(both, graph.constant(pick)) for pick in _PICKS)
    return graph.add(graph.mul(first, one), graph.mul(second, other))


# --- the mixture ------------------------------------------------------------------------------------------------


def extractor_graph(extractor: Network) -> onnx.ModelProto:
    """Build the forward pass of a shared extractor: ``sample`` (and ``mask`` of a text) → ``representation`` [b, m]."""
    sample = Tensor("sample", extractor.sample)
    graph = Graph(sizes_from=sample)
    mask = graph.input("mask", ("b", 1, "t"))
    tensors = _network(graph, extractor, EXTRACTOR)
    found = extractor.forward(graph, sample, mask, tensors)
    return graph.model("extractor", [sample, mask, *tensors.values()], {"representation": found})


def mixture_graph(
    architecture: Architecture,
    geometry: Geometry,
    targets: Sequence[str],
    outer: Outer,
    extractor: Network,
    depth: int,
) -> onnx.ModelProto:
    """Build a training step of the mixture whose private model is the top ``depth`` blocks of a backbone.

    Inputs are those of :func:`~fleetune.tools.pack.compile.suffix_graph`, whose head now maps features to the
    representation [d, m]; ``sample``, that of the extractor; its tensors as ``extractor.fc1.weight`` and so on;
    ``alpha.global`` and ``alpha.local`` [b, m], how much of either representation counts; ``header.weight`` [m, c] and
    ``header.bias`` [c]. Outputs are ``logits`` [b, c] and the gradients of the summed cross-entropy with respect to all
    that is learned and to both α. At depth 0 ``features`` [b, d] are an input, and ``grad.features`` an output: for a
    device that sends a batch through the blocks one by one.
    """
    h = Tensor("h", ("b", "t", geometry.width))
    features = Tensor("features", ("b", geometry.width))
    sample = Tensor("sample", extractor.sample)
    graph = Graph(sizes_from=h if depth else sample)
    mask = graph.input("mask", ("b", 1, "t"))
    leaves, learned = [h, mask], list[Tensor]()
    if depth:
        blocks = top_blocks(graph, architecture, geometry, targets, outer, h, mask, depth)
        features, learned = blocks.features, blocks.learned
        leaves += blocks.leaves
    else:
        leaves, learned = [features, mask], [features]
    width = extractor.representation
    head = graph.input("head.weight", (geometry.width, width)), graph.input("head.bias", (width,))
    local = graph.gemm(features, *head)
    outputs, leaves = _step(graph, extractor, sample, mask, local, [*learned, *head], [*leaves, *head, sample])
    return graph.model(f"mixture_{depth}", leaves, outputs)


def network_graphs(body: Network, extractor: Network) -> dict[str, onnx.ModelProto]:
    """Build all graphs of a mixture whose private model is a small network, trained whole, as in pFedMoE's paper.

    * ``extractor``, and those of the gate, which sees the flattened sample.
    * ``body``: ``sample`` → ``representation`` [b, m] of the private network.
    * ``mixture``: a training step, with the inputs and outputs of :func:`mixture_graph` as far as they are here; the
      private network's tensors are ``body.conv1.weight`` and so on. Both networks see the same ``sample``.
    """
    sample = Tensor("sample", body.sample)
    graph = Graph(sizes_from=sample)
    tensors = _network(graph, body, BODY)
    local = body.forward(graph, sample, None, tensors)
    learned = list(tensors.values())
    outputs, leaves = _step(graph, extractor, sample, None, local, learned, [sample, *learned])
    return {
        **gate_graphs(math.prod(size for size in sample.shape if isinstance(size, int)), GATE),
        "extractor": extractor_graph(extractor),
        "body": graph.model("body", [sample, *learned], {"representation": local}),
        "mixture": graph.model("mixture", leaves, outputs),
    }


def _network(graph: Graph, network: Network, prefix: str) -> dict[str, Tensor]:
    return {name: graph.input(f"{prefix}{name}", shape) for name, shape in network.shapes.items()}


def _step(
    graph: Graph,
    extractor: Network,
    sample: Tensor,
    mask: Tensor | None,
    local: Tensor,
    learned: Sequence[Tensor],
    leaves: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """From the local representation on: what a step's graph puts out, and its leaves."""
    width = extractor.representation
    shared = _network(graph, extractor, EXTRACTOR)
    alphas = [graph.input(name, ("b", width)) for name in ALPHAS]
    header = graph.input("header.weight", (width, "c")), graph.input("header.bias", ("c",))
    labels = graph.input("labels", ("b", "c"))
    global_ = extractor.forward(graph, sample, mask, shared)
    mixed = graph.add(graph.mul(global_, alphas[0]), graph.mul(local, alphas[1]))
    logits = graph.gemm(mixed, *header)
    wrt = [*learned, *shared.values(), *header, *alphas]
    slope = graph.sub(graph.softmax(logits), labels)  # gradient of the summed cross-entropy
    gradients = graph.gradients(logits, slope, wrt)
    outputs = {"logits": logits} | {f"grad.{leaf.name}": one for leaf, one in zip(wrt, gradients, strict=True)}
    return outputs, [*leaves, *shared.values(), *alphas, *header, labels]
