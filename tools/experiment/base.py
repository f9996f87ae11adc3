"""What every experiment has: clients with their samples, methods that play rounds, and what a round costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.pack.extractors import Cnn


class Samples(NamedTuple):
    """Labelled pictures.

    Attributes:
        images: Uint8 [n, 3, 32, 32].
        labels: Class of each, int64 [n].
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Client:
    """One client's own samples; a test sample is never trained on, by any client.

    Attributes:
        name: What it is called.
        train: What it learns from.
        test: What it is measured by, of the same distribution.
    """

    name: str
    train: Samples
    test: Samples


@dataclass(frozen=True)
class Federation:
    """All clients of one data set, dealt out by one split with one seed.

    Attributes:
        data: Name of the data set.
        split: Name of the split.
        classes: Number of classes.
        clients: The clients.
    """

    data: str
    split: str
    classes: int
    clients: tuple[Client, ...]


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters that all methods have, and pFedMoE's two further step sizes.

    Attributes:
        epochs: Passes over a client's samples in a round.
        batch: Samples a step.
        learning_rate: Step size of plain SGD, of what a client keeps and of what it shares.
        seed: Of initial values and of the order of samples.
        shared_learning_rate: Step size of θ; None for the same.
        gate_learning_rate: Step size of φ; None for the same.
        threads: Threads that compute a step; 0 for one a core.
    """

    epochs: int = 1
    batch: int = 64
    learning_rate: float = 0.05
    seed: int = 0
    shared_learning_rate: float | None = None
    gate_learning_rate: float | None = None
    threads: int = 0


@dataclass(frozen=True)
class Cost:
    """What one round took, over all clients that took part.

    Attributes:
        sent: Numbers that went up and down, in float32 values.
        flops: Floating-point operations of training.
    """

    sent: int
    flops: float


class Algorithm(Protocol):
    """A method in one federation. It keeps all clients' models; every client has one of its own from the start.

    Args:
        federation: The clients.
        models: The private model of each client.
        hyper: Hyper-parameters.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None: ...

    def play(self, sampled: Sequence[int]) -> Cost:
        """One round of some clients, by their places in the federation, in ascending order."""
        ...

    def accuracies(self) -> list[float]:
        """Share of each client's test samples that its model, as it would be used, gets right."""
        ...


def check_loss(loss: float, method: str, number: int, client: Client, hyper: Hyper) -> None:
    """See that a step gave a number.

    Args:
        loss: Of the step.
        method: Which method took it.
        number: Of the round.
        client: Whose step it was.
        hyper: What it was taken with.

    Raises:
        ConfigError: It did not.
    """
    if not math.isfinite(loss):
        raise ConfigError(
            f"{method} diverged in round {number}: the loss of client {client.name} is {loss}",
            f"use a smaller learning rate than {hyper.learning_rate:g}",
        )
