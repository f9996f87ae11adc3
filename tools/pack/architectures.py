"""The transformer architectures that Fleetune packs: what their weights are called, and how they compute.

Each architecture names its tensors once (Hugging Face key → canonical name) and writes its forward pass with
:class:`~fleetune.tools.pack.graph.Graph`. Everything else (quantisation, backward passes, the pack's files)
is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fleetune.edge.protocol.errors import UnsupportedBackboneError
from fleetune.tools.pack.graph import Graph, Tensor

LINEARS = ("query", "key", "value", "output", "fc1", "fc2")
"""The linear maps of a block; each may carry an adapter."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a backbone.

    Attributes:
        blocks: Number of transformer blocks, L.
        width: Width of the hidden state, d.
        heads: Attention heads.
        hidden: Width of the feed-forward layer.
        epsilon: Epsilon of every layer normalisation.
        length: Longest sequence: tokens of text, or patches and the class token of a picture.
    """

    blocks: int
    width: int
    heads: int
    hidden: int
    epsilon: float
    length: int


_MAX_SIZE = 1 << 20
_MAX_SHOWN = 80


def int_field(config: Mapping[str, Any], name: str) -> int:
    """A size from a Hugging Face configuration.

    Raises:
        UnsupportedBackboneError: It is absent, or no whole number that a backbone may have.
    """
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
        raise UnsupportedBackboneError(
            f"config.json: field {name}: expected a whole number from 1 to {_MAX_SIZE}, "
            f"found {repr(value)[:_MAX_SHOWN]}",
            "save the backbone again",
        )
    return value


def _small_field(config: Mapping[str, Any], name: str) -> float:
    """A number between zero and one from a Hugging Face configuration.

    Raises:
        UnsupportedBackboneError: It is absent, or something else.
    """
    value = config.get(name)
    if not isinstance(value, float | int) or not 0 < value < 1:
        raise UnsupportedBackboneError(
            f"config.json: field {name}: expected a number between 0 and 1, found {repr(value)[:_MAX_SHOWN]}",
            "save the backbone again",
        )
    return float(value)


@dataclass(frozen=True)
class BlockWeights:
    """Symbolic weights of one block, and the adapters of those linear maps that carry one.

    Attributes:
        tensors: Canonical name (``query.weight``, ``norm1.bias`` …) → graph input.
        adapters: Linear map → (A of shape [in, r], B of shape [r, out]); with a leading axis of experts where the rows
            of several experts follow each other.
    """

    tensors: Mapping[str, Tensor]
    adapters: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def learned(self) -> list[Tensor]:
        """The adapters' tensors."""
        return [tensor for pair in self.adapters.values() for tensor in pair]

    @property
    def inputs(self) -> list[Tensor]:
        """All of them, as inputs of a graph."""
        return [*self.tensors.values(), *self.learned]

    def linear(self, graph: Graph, name: str, x: Tensor, *, before: float = 1.0, after: float = 1.0) -> Tensor:
        """``x Wᵀ + b``, and ``+ (x A) B`` where the map carries an adapter (LoRA: Hu et al. 2021, eq. 3, α = r).

        Args:
            graph: Records the operations.
            name: The linear map.
            x: Its input [n, in].
            before: A factor of the input, which costs nothing here.
            after: A factor of the output, likewise.
        """
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        y = graph.gemm(x, weight, bias, trans_b=True, alpha=before * after, beta=after)
        if name in self.adapters:
            a, b = self.adapters[name]
            if len(a.shape) == 3:
                experts = graph.reshape(x, (a.shape[0], "m", x.shape[1]))
                low = graph.mul(graph.matmul(experts, a), before * after)
                return graph.add(y, graph.reshape(graph.matmul(low, b), y.shape))
            y = graph.gemm(graph.gemm(x, a, alpha=before), b, y, alpha=after)
        return y


class Architecture(Protocol):
    """One family of backbones."""

    @property
    def modality(self) -> str:
        """``text`` or ``image``."""
        ...

    def geometry(self, config: Mapping[str, Any], image_size: int | None) -> Geometry:
        """Read the sizes from a Hugging Face configuration."""
        ...

    def block_keys(self, index: int) -> dict[str, str]:
        """Hugging Face key → canonical name, for one block."""
        ...

    def outer_keys(self) -> dict[str, str]:
        """Hugging Face key → canonical name, for the tensors around the blocks."""
        ...

    def outer_shapes(self, config: Mapping[str, Any], geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape, for the tensors around the blocks as the checkpoint holds them."""
        ...

    def ignored(self, key: str) -> bool:
        """Whether a tensor of the checkpoint takes no part in the features (a pooler, a mask token)."""
        ...

    def prepare(
        self, outer: dict[str, np.ndarray[Any, Any]], config: Mapping[str, Any], geometry: Geometry
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Turn the outer checkpoint tensors into those the graphs take."""
        ...

    def embed(self, graph: Graph, sample: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """Hidden state [b, t, d] before the first block."""
        ...

    def block(self, graph: Graph, h: Tensor, mask: Tensor, weights: BlockWeights, geometry: Geometry) -> Tensor:
        """Hidden state [b, t, d] after one block; ``mask`` [b, 1, t] is 1 for real tokens and 0 for padding."""
        ...

    def pool(self, graph: Graph, h: Tensor, mask: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """Features [b, d] from the hidden state after the last block."""
        ...

    def top(
        self,
        graph: Graph,
        h: Tensor,
        mask: Tensor,
        weights: BlockWeights,
        outer: Mapping[str, Tensor],
        geometry: Geometry,
    ) -> Tensor:
        """Features [b, d] from the hidden state before the last block, without what they do not depend on."""
        ...


def _attention(
    graph: Graph, x: Tensor, mask: Tensor, weights: BlockWeights, geometry: Geometry, asks: Tensor | None = None
) -> Tensor:
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1) on the flat tokens [n, d], output projection included.

    Where only one token of each sample asks, ``asks`` is its row [b, d], and so is the result.
    """
    heads, size = geometry.heads, geometry.width // geometry.heads

    def split(name: str, rows: Tensor, tokens: int | str = "t") -> Tensor:
        return graph.reshape(weights.linear(graph, name, rows), ("b", tokens, heads, size))

    query = graph.transpose(split("query", x) if asks is None else split("query", asks, 1), (0, 2, 1, 3))
    key = graph.transpose(split("key", x), (0, 2, 3, 1))
    value = graph.transpose(split("value", x), (0, 2, 1, 3))
    scores = graph.mul(graph.matmul(query, key), 1 / math.sqrt(size))
    # A token that is padding gets a score of −1e9 from everyone, which softmax turns into an exact zero.
    hidden = graph.add(graph.mul(mask, 1e9), graph.constant(np.float32(-1e9)))
    probabilities = graph.softmax(graph.add(scores, graph.unsqueeze(hidden, 1)))
    context = graph.transpose(graph.matmul(probabilities, value), (0, 2, 1, 3))
    return weights.linear(graph, "output", graph.reshape(context, ("n" if asks is None else "b", geometry.width)))


def _feed_forward(graph: Graph, x: Tensor, weights: BlockWeights) -> Tensor:
    """Two maps with a GELU between, ``x Φ(x) = u (1 + erf u) / √2`` with ``u = x / √2``; the roots cost nothing."""
    root = 1 / math.sqrt(2)
    u = weights.linear(graph, "fc1", x, after=root)
    return weights.linear(graph, "fc2", graph.gate(u), before=root)


def _norm(graph: Graph, x: Tensor, name: str, tensors: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    return graph.layer_norm(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], geometry.epsilon)


def _with_suffixes(keys: Mapping[str, str]) -> dict[str, str]:
    return {f"{hf}.{kind}": f"{name}.{kind}" for hf, name in keys.items() for kind in ("weight", "bias")}


@dataclass(frozen=True)
class Bert:
    """BERT (Devlin et al. 2018): normalisation after each residual sum; features are the mean over real tokens."""

    modality: str = "text"

    def geometry(self, config: Mapping[str, Any], image_size: int | None) -> Geometry:
        """Read the sizes from a Hugging Face configuration."""
        del image_size
        return Geometry(
            blocks=int_field(config, "num_hidden_layers"),
            width=int_field(config, "hidden_size"),
            heads=int_field(config, "num_attention_heads"),
            hidden=int_field(config, "intermediate_size"),
            epsilon=_small_field(config, "layer_norm_eps"),
            length=int_field(config, "max_position_embeddings"),
        )

    def block_keys(self, index: int) -> dict[str, str]:
        """Hugging Face key → canonical name, for one block."""
        stem = f"encoder.layer.{index}"
        return _with_suffixes(
            {
                f"{stem}.attention.self.query": "query",
                f"{stem}.attention.self.key": "key",
                f"{stem}.attention.self.value": "value",
                f"{stem}.attention.output.dense": "output",
                f"{stem}.attention.output.LayerNorm": "norm1",
                f"{stem}.intermediate.dense": "fc1",
                f"{stem}.output.dense": "fc2",
                f"{stem}.output.LayerNorm": "norm2",
            }
        )

    def outer_keys(self) -> dict[str, str]:
        """Hugging Face key → canonical name, for the tensors around the blocks."""
        return {
            "embeddings.word_embeddings.weight": "tokens.table",
            "embeddings.position_embeddings.weight": "positions.table",
            "embeddings.token_type_embeddings.weight": "types.table",
            "embeddings.LayerNorm.weight": "embed_norm.weight",
            "embeddings.LayerNorm.bias": "embed_norm.bias",
        }

    def outer_shapes(self, config: Mapping[str, Any], geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape, for the tensors around the blocks as the checkpoint holds them."""
        width = geometry.width
        return {
            "tokens.table": (int_field(config, "vocab_size"), width),
            "positions.table": (geometry.length, width),
            "types.table": (int_field(config, "type_vocab_size"), width),
            "embed_norm.weight": (width,),
            "embed_norm.bias": (width,),
        }

    def ignored(self, key: str) -> bool:
        """Whether a tensor of the checkpoint takes no part in the features."""
        return key.startswith("pooler.") or key == "embeddings.position_ids"

    def prepare(
        self, outer: dict[str, np.ndarray[Any, Any]], config: Mapping[str, Any], geometry: Geometry
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Fold the token type (always the first segment) into the positions."""
        del config, geometry
        types = outer.pop("types.table")
        outer["positions.table"] = (outer["positions.table"] + types[0]).astype(np.float32)
        return outer

    def embed(self, graph: Graph, sample: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """``sample`` holds the rows of the token table [b, t, d]; the device looks them up in the mapped file."""
        return _norm(graph, graph.add(sample, outer["positions"]), "embed_norm", outer, geometry)

    def block(self, graph: Graph, h: Tensor, mask: Tensor, weights: BlockWeights, geometry: Geometry) -> Tensor:
        """Hidden state [b, t, d] after one block."""
        x = graph.reshape(h, ("n", geometry.width))
        attended = graph.add(_attention(graph, x, mask, weights, geometry), x)
        middle = _norm(graph, attended, "norm1", weights.tensors, geometry)
        out = _norm(graph, graph.add(_feed_forward(graph, middle, weights), middle), "norm2", weights.tensors, geometry)
        return graph.reshape(out, ("b", "t", geometry.width))

    def pool(self, graph: Graph, h: Tensor, mask: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """Mean of the hidden states of real tokens."""
        del outer
        share = graph.div(mask, graph.sum(mask, -1))
        return graph.reshape(graph.matmul(share, h), ("b", geometry.width))

    def top(
        self,
        graph: Graph,
        h: Tensor,
        mask: Tensor,
        weights: BlockWeights,
        outer: Mapping[str, Tensor],
        geometry: Geometry,
    ) -> Tensor:
        """The mean depends on every token."""
        return self.pool(graph, self.block(graph, h, mask, weights, geometry), mask, outer, geometry)


@dataclass(frozen=True)
class Dinov2:
    """DINOv2 (Oquab et al. 2023): normalisation first, layer scale; features are the class token."""

    modality: str = "image"

    def geometry(self, config: Mapping[str, Any], image_size: int | None) -> Geometry:
        """Read the sizes from a Hugging Face configuration."""
        side = (int_field(config, "image_size") if image_size is None else image_size) // int_field(
            config, "patch_size"
        )
        width = int_field(config, "hidden_size")
        return Geometry(
            blocks=int_field(config, "num_hidden_layers"),
            width=width,
            heads=int_field(config, "num_attention_heads"),
            hidden=width * int_field(config, "mlp_ratio"),
            epsilon=_small_field(config, "layer_norm_eps"),
            length=side * side + 1,
        )

    def block_keys(self, index: int) -> dict[str, str]:
        """Hugging Face key → canonical name, for one block."""
        stem = f"encoder.layer.{index}"
        keys = _with_suffixes(
            {
                f"{stem}.norm1": "norm1",
                f"{stem}.attention.attention.query": "query",
                f"{stem}.attention.attention.key": "key",
                f"{stem}.attention.attention.value": "value",
                f"{stem}.attention.output.dense": "output",
                f"{stem}.norm2": "norm2",
                f"{stem}.mlp.fc1": "fc1",
                f"{stem}.mlp.fc2": "fc2",
            }
        )
        keys[f"{stem}.layer_scale1.lambda1"] = "scale1"
        keys[f"{stem}.layer_scale2.lambda1"] = "scale2"
        return keys

    def outer_keys(self) -> dict[str, str]:
        """Hugging Face key → canonical name, for the tensors around the blocks."""
        return {
            "embeddings.cls_token": "class_token",
            "embeddings.position_embeddings": "positions.table",
            "embeddings.patch_embeddings.projection.weight": "patch.weight",
            "embeddings.patch_embeddings.projection.bias": "patch.bias",
            "layernorm.weight": "final_norm.weight",
            "layernorm.bias": "final_norm.bias",
        }

    def outer_shapes(self, config: Mapping[str, Any], geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape, for the tensors around the blocks as the checkpoint holds them."""
        width, patch = geometry.width, int_field(config, "patch_size")
        side = int_field(config, "image_size") // patch
        return {
            "class_token": (1, 1, width),
            "positions.table": (1, side * side + 1, width),
            "patch.weight": (width, 3, patch, patch),
            "patch.bias": (width,),
            "final_norm.weight": (width,),
            "final_norm.bias": (width,),
        }

    def ignored(self, key: str) -> bool:
        """Whether a tensor of the checkpoint takes no part in the features."""
        return key == "embeddings.mask_token"

    def prepare(
        self, outer: dict[str, np.ndarray[Any, Any]], config: Mapping[str, Any], geometry: Geometry
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Resize the position grid to the pack's image size; fold the class token and the patches' bias into it.

        The grid is resized as transformers does it: bicubic, without antialiasing.
        """
        import torch

        table = torch.from_numpy(outer.pop("positions.table"))
        side = math.isqrt(geometry.length - 1)
        grid_side = int_field(config, "image_size") // int_field(config, "patch_size")
        grid = table[:, 1:].reshape(1, grid_side, grid_side, -1).permute(0, 3, 1, 2)
        if side != grid_side:
            grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        rows = grid.permute(0, 2, 3, 1).reshape(side * side, -1).numpy() + outer.pop("patch.bias")
        first = outer.pop("class_token")[0] + table[0, :1].numpy()
        outer["positions.table"] = np.concatenate([first, rows]).astype(np.float32)
        outer["patch.weight"] = outer["patch.weight"].reshape(geometry.width, -1)
        return outer

    def embed(self, graph: Graph, sample: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """``sample`` holds patches [b, t, 3·p²], the first all zeros: its place is the class token's."""
        flat = graph.reshape(sample, ("n", sample.shape[2]))
        projected = graph.gemm(flat, outer["patch.weight"], trans_b=True)
        tokens = graph.reshape(projected, ("b", "t", geometry.width))
        return graph.add(tokens, outer["positions"])

    def block(self, graph: Graph, h: Tensor, mask: Tensor, weights: BlockWeights, geometry: Geometry) -> Tensor:
        """Hidden state [b, t, d] after one block."""
        x = graph.reshape(h, ("n", geometry.width))
        attended = _attention(graph, _norm(graph, x, "norm1", weights.tensors, geometry), mask, weights, geometry)
        return graph.reshape(self._rest(graph, attended, x, weights, geometry), ("b", "t", geometry.width))

    def _rest(self, graph: Graph, attended: Tensor, x: Tensor, weights: BlockWeights, geometry: Geometry) -> Tensor:
        """What follows attention, row by row."""
        tensors = weights.tensors
        middle = graph.add(graph.mul(attended, tensors["scale1"]), x)
        fed = _feed_forward(graph, _norm(graph, middle, "norm2", tensors, geometry), weights)
        return graph.add(graph.mul(fed, tensors["scale2"]), middle)

    def _class_token(self, graph: Graph, h: Tensor, geometry: Geometry) -> Tensor:
        """[b, t, d] → [b, d]."""
        select = np.zeros((1, 1, geometry.length), dtype=np.float32)
        select[0, 0, 0] = 1.0
        return graph.reshape(graph.matmul(graph.constant(select), h), ("b", geometry.width))

    def pool(self, graph: Graph, h: Tensor, mask: Tensor, outer: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The class token after the final normalisation."""
        del mask
        return _norm(graph, self._class_token(graph, h, geometry), "final_norm", outer, geometry)

    def top(
        self,
        graph: Graph,
        h: Tensor,
        mask: Tensor,
        weights: BlockWeights,
        outer: Mapping[str, Tensor],
        geometry: Geometry,
    ) -> Tensor:
        """Of the other tokens only keys and values matter: the class token alone asks and is fed forward."""
        x = graph.reshape(h, ("n", geometry.width))
        normal = _norm(graph, x, "norm1", weights.tensors, geometry)
        asks = self._class_token(graph, graph.reshape(normal, ("b", "t", geometry.width)), geometry)
        attended = _attention(graph, normal, mask, weights, geometry, asks)
        out = self._rest(graph, attended, self._class_token(graph, h, geometry), weights, geometry)
        return _norm(graph, out, "final_norm", outer, geometry)


ARCHITECTURES: dict[str, Architecture] = {"bert": Bert(), "dinov2": Dinov2()}
"""``model_type`` of a Hugging Face configuration → how to pack it."""
