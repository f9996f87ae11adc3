"""Writes a whole model as one ONNX graph: backbone, adapters, head, and for a mixture both experts and the gate.

Weights are constants of the graph. An adapter is merged into the matrix that carries it, ``W + (A B)ᵀ``; a tensor that
both experts of a mixture share is there once, and so is every block below the lowest one in which they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.gate import EPSILON, Gate
from fleetune.edge.engine.mixture import Mixture
from fleetune.tools.export.unpacked import Unpacked
from fleetune.tools.pack.architectures import LINEARS, BlockWeights
from fleetune.tools.pack.graph import Graph, Tensor

FloatArray = NDArray[np.float32]

_AXES = {"b": "batch", "t": "sequence"}


def network(backbone: Unpacked, model: Expert | Mixture, properties: Mapping[str, str]) -> onnx.ModelProto:
    """Build the graph.

    Args:
        backbone: The dequantised backbone.
        model: One expert, or a mixture.
        properties: The ONNX file's metadata.

    Returns:
        A model with the inputs ``input_ids`` and ``attention_mask`` int64 [batch, sequence], or ``pixel_values``
        float32 [batch, 3, size, size], and the outputs ``logits`` [batch, classes] and, of a mixture, ``gate``
        [batch, 2]: the weights of the global and the local expert.
    """
    writer = _Writer(backbone)
    outputs = writer.mixture(model) if isinstance(model, Mixture) else {"logits": writer.expert(model)}
    found = writer.graph.model("model", writer.inputs, outputs)
    for node in found.graph.node:
        node.name = node.output[0]
    for value in (*found.graph.input, *found.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = _AXES[axis.dim_param]
    helper.set_model_props(found, dict(properties))
    onnx.checker.check_model(found)
    return found


@dataclass(frozen=True)
class _Merged(BlockWeights):
    """One block's weights under one expert, as constants.

    Attributes:
        writer: Embeds them.
        matrices: ``query.weight``, ``query.bias`` and so on → name of the constant, and value before any factor.
    """

    writer: _Writer
    matrices: Mapping[str, tuple[str, FloatArray]]

    def linear(self, graph: Graph, name: str, x: Tensor, *, before: float = 1.0, after: float = 1.0) -> Tensor:
        """``x Wᵀ + b`` as a product with a constant and a sum, as quantisers look for them; factors are merged."""
        weight, bias = (self.matrices[f"{name}.{kind}"] for kind in ("weight", "bias"))
        product = graph.matmul(x, self.writer.constant(weight[0], weight[1].T * np.float32(before * after)))
        return graph.add(product, self.writer.constant(bias[0], bias[1] * np.float32(after)))


class _Writer:
    """Writes the parts of a graph; what is asked for twice is written once."""

    def __init__(self, backbone: Unpacked) -> None:
        self._backbone = backbone
        self._constants: dict[str, Tensor] = {}
        self._values: dict[str, FloatArray] = {}
        if backbone.manifest.text is not None:
            self._read_text()
        else:
            self._read_pictures()

    def constant(self, name: str, value: FloatArray) -> Tensor:
        """A named constant; a name has one value."""
        if name not in self._values:
            self._values[name] = np.ascontiguousarray(value)
            self._constants[name] = self.graph.constant(self._values[name], name)
        assert np.array_equal(self._values[name], value), name
        return self._constants[name]

    # --- what goes in -------------------------------------------------------------------------------------------

    def _read_text(self) -> None:
        ids = Tensor("input_ids", ("b", "t"), TensorProto.INT64)
        attention = Tensor("attention_mask", ("b", "t"), TensorProto.INT64)
        self.inputs, self.graph = [ids, attention], Graph(sizes_from=ids)
        self._mask = self.graph.unsqueeze(self.graph.floats(attention), 1)
        table, positions = (self._outer(name) for name in ("tokens.table", "positions.table"))
        self._embed(self.graph.gather(table, ids), self.graph.first_rows(positions, ids))

    def _read_pictures(self) -> None:
        image = self._backbone.manifest.image
        assert image is not None
        side, patch = image.size // image.patch, image.patch
        pixels = Tensor("pixel_values", ("b", 3, image.size, image.size))
        self.inputs, self.graph = [pixels], Graph(sizes_from=pixels)
        self._mask = self.constant("mask", np.ones((1, 1, side * side + 1), dtype=np.float32))
        grid = self.graph.reshape(pixels, ("b", 3, side, patch, side, patch))
        rows = self.graph.transpose(grid, (0, 2, 4, 1, 3, 5))
        patches = self.graph.reshape(rows, ("b", side * side, 3 * patch * patch))
        sample = self.graph.zero_row_first(patches)
        self.graph.sizes_from = sample
        self._embed(sample, self._outer("positions.table"))

    def _outer(self, name: str) -> Tensor:
        return self.constant(name, self._backbone.outer[name])

    def _embed(self, sample: Tensor, positions: Tensor) -> None:
        """Keep the hidden state before the first block."""
        self._around = {name: self._outer(name) for name in self._backbone.outer if not name.endswith(".table")}
        around = self._around | {"positions": positions}
        self._embedded = self._backbone.architecture.embed(self.graph, sample, around, self._backbone.geometry)

    # --- experts ------------------------------------------------------------------------------------------------

    def _block(self, index: int, expert: Expert, other: Expert | None) -> _Merged:
        """A block under one expert; matrices that differ from the other expert's bear the name ``local``."""
        tensors, matrices = dict[str, Tensor](), dict[str, tuple[str, FloatArray]]()
        for name, value in self._backbone.blocks[index].items():
            linear, _, kind = name.partition(".")
            if linear not in LINEARS:
                tensors[name] = self.constant(f"blocks.{index}.{name}", value)
                continue
            owner = ""
            if linear in self._backbone.manifest.targets and kind == "weight":
                a, b = (expert.tensors[f"blocks.{index}.{linear}.{side}"] for side in "AB")
                value = value + (a @ b).T
                owner = "" if other is None or expert.agrees(other, index, linear) else "local."
            matrices[name] = f"{owner}blocks.{index}.{name}", value
        return _Merged(tensors, {}, self, matrices)

    def _features(
        self, expert: Expert, other: Expert | None = None, start: int = 0, hidden: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features under an expert, and the hidden states before the blocks from ``start`` on."""
        architecture, geometry = self._backbone.architecture, self._backbone.geometry
        before = [self._embedded if hidden is None else hidden]
        for index in range(start, geometry.blocks - 1):
            weights = self._block(index, expert, other)
            before.append(architecture.block(self.graph, before[-1], self._mask, weights, geometry))
        last = self._block(geometry.blocks - 1, expert, other)
        features = architecture.top(self.graph, before[-1], self._mask, last, self._around, geometry)
        return features, before

    def _logits(self, features: Tensor, expert: Expert, owner: str = "") -> Tensor:
        weight, bias = (
            self.constant(f"{owner}head.{kind}", expert.tensors[f"head.{kind}"]) for kind in ("weight", "bias")
        )
        return self.graph.gemm(features, weight, bias)

    def expert(self, expert: Expert) -> Tensor:
        """Logits of one expert."""
        return self._logits(self._features(expert)[0], expert)

    def mixture(self, mixture: Mixture) -> dict[str, Tensor]:
        """Logits and the gate's weights: one pass below the lowest block that differs, two above it."""
        of_global, before = self._features(mixture.global_)
        start = mixture.global_.lowest_difference(mixture.local)
        of_local = of_global
        if start < self._backbone.geometry.blocks:
            of_local, _ = self._features(mixture.local, mixture.global_, start, before[start])
        gate = self._gate(mixture.gate, self._mean(before[mixture.boundary]))
        shares = [self.graph.slice(gate, {1: (index, index + 1)}) for index in range(2)]
        if mixture.mix == "features":
            features = self._mix([of_global, of_local], shares)
            return {"logits": self._logits(features, mixture.local, "local."), "gate": gate}
        logits = [self._logits(of_global, mixture.global_), self._logits(of_local, mixture.local, "local.")]
        return {"logits": self._mix(logits, shares), "gate": gate}

    def _mix(self, experts: list[Tensor], shares: list[Tensor]) -> Tensor:
        first, second = (self.graph.mul(expert, share) for expert, share in zip(experts, shares, strict=True))
        return self.graph.add(first, second)

    # --- the gate -----------------------------------------------------------------------------------------------

    def _mean(self, hidden: Tensor) -> Tensor:
        """Mean over real tokens: [b, t, d] → [b, d]."""
        share = self.graph.div(self._mask, self.graph.sum(self._mask, -1))
        return self.graph.reshape(self.graph.matmul(share, hidden), ("b", self._backbone.geometry.width))

    def _gate(self, gate: Gate, pooled: Tensor) -> Tensor:
        """Weights [b, 2], as :class:`~fleetune.edge.engine.gate.Gate` computes them."""
        graph, t = self.graph, {name: self.constant(name, value) for name, value in gate.tensors.items()}
        centred = graph.sub(pooled, graph.mean(pooled, -1))
        deviation = graph.unary("Sqrt", graph.mean(graph.mul(centred, centred), -1))
        x = graph.div(centred, graph.add(deviation, graph.constant(EPSILON)))
        z = graph.gemm(graph.gemm(x, t["gate.A"]), t["gate.B"], x)
        return graph.softmax(graph.gemm(z, t["gate.weight"], t["gate.bias"]))
