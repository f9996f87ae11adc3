"""pFedMoE's networks in torch, with its autograd and its layers: what ours are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fleetune.tools.pack.extractors import Cnn, DeepAveragingNetwork
from fleetune.tools.pack.mixture import EPSILON


class TorchCnn(nn.Module):  # type: ignore[misc]
    """A CNN without its header: pictures [b, 3, 32, 32] → representation [b, m]."""

    def __init__(self, cnn: Cnn) -> None:
        super().__init__()
        first, second = cnn.filters
        self.conv1, self.conv2 = nn.Conv2d(3, first, 5), nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(cnn.shapes["fc1.weight"][0], cnn.hidden)
        self.fc2 = nn.Linear(cnn.hidden, cnn.representation)

    def forward(self, x: Tensor) -> Tensor:
        """The representation."""
        x = functional.max_pool2d(self.conv1(x).relu(), 2)
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        found: Tensor = self.fc2(self.fc1(x.flatten(1)).relu()).relu()
        return found


class TorchAveraging(nn.Module):  # type: ignore[misc]
    """A deep averaging network: token rows [b, t, e] and their mask [b, 1, t] → representation [b, m]."""

    def __init__(self, network: DeepAveragingNetwork) -> None:
        super().__init__()
        self.fc1 = nn.Linear(network.embedding, network.hidden)
        self.fc2 = nn.Linear(network.hidden, network.representation)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The representation."""
        real = mask.transpose(1, 2)
        tokens = self.fc1(functional.layer_norm(x, x.shape[2:], eps=EPSILON)).relu() * real
        found: Tensor = self.fc2(tokens.sum(1) / real.sum(1))
        return found


class SwitchNorm(nn.Module):  # type: ignore[misc]
    """Switchable normalisation of vectors [b, d] (Luo et al., 2019), over features and batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean_weight, self.variance_weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over this batch."""
        means, variances = self.mean_weight.softmax(0), self.variance_weight.softmax(0)
        mean = means[0] * x.mean(1, keepdim=True) + means[1] * x.mean(0, keepdim=True)
        over_features, over_batch = x.var(1, correction=0, keepdim=True), x.var(0, correction=0, keepdim=True)
        variance = variances[0] * over_features + variances[1] * over_batch
        return (x - mean) / (variance + EPSILON).sqrt() * self.weight + self.bias


class TorchGate(nn.Module):  # type: ignore[misc]
    """x [b, inputs] → how much each expert counts [b, 2]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.switch, self.norm1, self.norm2 = SwitchNorm(inputs), nn.BatchNorm1d(hidden), nn.BatchNorm1d(2)
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The weights of the global and of the local expert."""
        hidden = self.norm1(self.fc1(self.switch(x))).sigmoid()
        found: Tensor = self.norm2(self.fc2(hidden)).softmax(1)
        return found


def parameters_of(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Name that Fleetune gives it → parameter."""
    return {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}


def load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, NDArray[Any]]) -> None:
    """Give parameters their values; ours are [in, out] where torch's linear maps are [out, in]."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(as_torch(values[name]))


def as_torch(value: NDArray[Any]) -> Tensor:
    """A tensor of ours as torch lays it out, and the other way round: linear maps are transposed."""
    return torch.from_numpy(value.T.copy() if value.ndim == 2 else value)
