"""Small networks that are trained whole: what pFedMoE's devices share, and the private CNNs of its paper.

Each says what its tensors are called and writes its forward pass with :class:`~fleetune.tools.pack.graph.Graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from fleetune.tools.pack.graph import Graph, Shape, Tensor

SIDE = 32
"""Height and width of the pictures that a CNN takes, in pixels."""


class Network(Protocol):
    """From a sample to its representation.

    Attributes:
        kind: What it is called in a pack.
    """

    kind: ClassVar[Literal["cnn", "dan"]]

    @property
    def representation(self) -> int:
        """Width of the representation, m."""
        ...

    @property
    def sample(self) -> Shape:
        """Shape of a batch of samples, the first size being ``b``."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of what is trained."""
        ...

    def forward(self, graph: Graph, sample: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """The representation [b, m] of a batch.

        Args:
            graph: Records the operations.
            sample: The samples.
            mask: 1 for each real token of a text [b, 1, t].
            tensors: Canonical name → what is trained.
        """
        ...


@dataclass(frozen=True)
class Cnn:
    """Two convolutions of 5 by 5, each followed by max-pooling, and two linear maps, with ReLU after each of the four.

    Pictures are [b, 3, 32, 32], from −1 to 1.

    Attributes:
        filters: Of the first and of the second convolution.
        hidden: Width of the first linear map.
        representation: Width of the second.
    """

    kind: ClassVar[Literal["cnn", "dan"]] = "cnn"

    filters: tuple[int, int]
    hidden: int
    representation: int = 500

    @property
    def sample(self) -> Shape:
        """[b, 3, 32, 32]."""
        return ("b", 3, SIDE, SIDE)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Convolutions are [out, in, 5, 5], linear maps [in, out]."""
        first, second = self.filters
        side = ((SIDE - 4) // 2 - 4) // 2
        return {
            "conv1.weight": (first, 3, 5, 5),
            "conv1.bias": (first,),
            "conv2.weight": (second, first, 5, 5),
            "conv2.bias": (second,),
            "fc1.weight": (second * side * side, self.hidden),
            "fc1.bias": (self.hidden,),
            "fc2.weight": (self.hidden, self.representation),
            "fc2.bias": (self.representation,),
        }

    def forward(self, graph: Graph, sample: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """The representation [b, m]."""
        del mask
        x = sample
        for name in ("conv1", "conv2"):
            # The largest value first and ReLU then is the same, on a quarter of the numbers.
            x = graph.relu(graph.halve(graph.conv(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])))
        x = graph.reshape(x, ("b", self.shapes["fc1.weight"][0]))
        return _linear_relu(graph, _linear_relu(graph, x, "fc1", tensors), "fc2", tensors)


@dataclass(frozen=True)
class DeepAveragingNetwork:
    """The mean of a text's tokens, each after a linear map with ReLU, and a linear map (after Iyyer et al., 2015).

    Samples are rows of the frozen token table [b, t, e]. Each row is normalised first, to mean 0 and variance 1: in a
    table as BERT has it numbers are about 0.05, and biases would drown them. The second map has no ReLU, which in so
    small a network died on some devices within a few rounds.

    Attributes:
        embedding: Width of the token table, e.
        hidden: Width of the first linear map.
        representation: Width of the second.
    """

    kind: ClassVar[Literal["cnn", "dan"]] = "dan"

    embedding: int
    hidden: int = 256
    representation: int = 256

    @property
    def sample(self) -> Shape:
        """[b, t, e]."""
        return ("b", "t", self.embedding)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Linear maps are [in, out]."""
        return {
            "fc1.weight": (self.embedding, self.hidden),
            "fc1.bias": (self.hidden,),
            "fc2.weight": (self.hidden, self.representation),
            "fc2.bias": (self.representation,),
        }

    def forward(self, graph: Graph, sample: Tensor, mask: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """The representation [b, m]."""
        assert mask is not None
        weight, bias = graph.constant(np.ones(self.embedding)), graph.constant(np.zeros(self.embedding))
        rows = graph.layer_norm(graph.reshape(sample, ("n", self.embedding)), weight, bias, _EPSILON)
        tokens = _linear_relu(graph, rows, "fc1", tensors)
        share = graph.div(mask, graph.sum(mask, -1))
        mean = graph.matmul(share, graph.reshape(tokens, ("b", "t", self.hidden)))
        return graph.gemm(graph.reshape(mean, ("b", self.hidden)), tensors["fc2.weight"], tensors["fc2.bias"])


_EPSILON = 1e-5


def _linear_relu(graph: Graph, x: Tensor, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    return graph.relu(graph.gemm(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))


CNNS: dict[str, Cnn] = {
    "cnn-1": Cnn((16, 32), 2000),
    "cnn-2": Cnn((16, 16), 2000),
    "cnn-3": Cnn((16, 32), 1000),
    "cnn-4": Cnn((16, 32), 800),
    "cnn-5": Cnn((16, 32), 500),
}
"""The private models of pFedMoE's paper without their headers (Yi et al., 2024, table of model structures)."""

SHARED_CNN = CNNS["cnn-5"]
"""What the devices share where samples are pictures: 665,048 parameters."""
