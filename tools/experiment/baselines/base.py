"""What all baselines share: a client's model in torch, its batches, means over clients, and what a round costs.

A round gives each of its clients one download and one upload, and :class:`~fleetune.tools.experiment.base.Cost` counts
those. What the server made of a round is with the round's clients at its end; a client that was away catches up when
its next round begins, from whatever is newest then, which is the same download. Initial values follow from the seed and
are not sent. Labels and numbers of samples, some integers that go with what is sent, are not counted, nor is what the
server computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fleetune.edge.methods.pfedmoe.extractor import centred
from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.experiment.base import Cost, Federation, Hyper, check_loss
from fleetune.tools.experiment.flops import forward_flops, header_flops, training_flops
from fleetune.tools.pack.extractors import Cnn
from fleetune.tools.pack.torch_networks import TorchCnn

SHARED = -1
"""The place of a model that belongs to no client, where a client's place in the federation is asked for."""

_AT_ONCE = 500
"""Pictures that are evaluated in one go."""

State = dict[str, Tensor]
"""Name → values of a network or of a part of one."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""What to make smaller, of pictures [b, 3, 32, 32] and their labels [b]."""


class Classifier(nn.Module):  # type: ignore[misc]
    """A body and its header: pictures [b, 3, 32, 32] → logits [b, classes].

    Attributes:
        cnn: What the body is.
        body: From pictures to representations [b, m].
        header: From representations to logits.
        flops: Operations of one picture's way to its logits.
    """

    def __init__(self, cnn: Cnn, classes: int) -> None:
        super().__init__()
        self.cnn = cnn
        self.body, self.header = TorchCnn(cnn), nn.Linear(cnn.representation, classes)
        self.flops = forward_flops(cnn) + header_flops(cnn, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """The logits."""
        found: Tensor = self.header(self.body(pictures))
        return found


class ClassMeans(NamedTuple):
    """What a client's representations are like, for each class that it has.

    Attributes:
        labels: The classes, ascending [c].
        means: Mean representation of each [c, m].
        counts: Samples of each [c].
    """

    labels: Tensor
    means: Tensor
    counts: Tensor


class Baseline(ABC):
    """A method whose clients each keep a model of their own, of a body and a header.

    Args:
        federation: The clients.
        models: The body of each client.
        hyper: Hyper-parameters.

    Raises:
        ConfigError: There is not one body for each client, or a client has nothing to train or to test with.
    """

    def __init__(self, federation: Federation, models: Sequence[Cnn], hyper: Hyper) -> None:
        clients = federation.clients
        if len(models) != len(clients):
            raise ConfigError(
                f"there are {len(models)} models for {len(clients)} clients", "give each client one, in the same order"
            )
        for client in clients:
            if not len(client.train.labels) or not len(client.test.labels):
                raise ConfigError(
                    f"client {client.name} has {len(client.train.labels)} samples to train and "
                    f"{len(client.test.labels)} to test with",
                    "deal the data out to fewer clients, or more evenly",
                )
        self._federation, self._hyper, self._round = federation, hyper, 0
        if hyper.threads:
            torch.set_num_threads(hyper.threads)
        self.models = [initial(cnn, federation.classes, hyper.seed, place) for place, cnn in enumerate(models)]
        """Each client's own."""

    def play(self, sampled: Sequence[int]) -> Cost:
        """One round of some clients, at least one, by their places in the federation, in ascending order.

        Raises:
            ConfigError: Training diverged.
        """
        self._round += 1
        return self._played(sampled)

    def accuracies(self) -> list[float]:
        """Share of each client's test samples that its model, as it would be used, gets right."""
        return [self._accuracy(client) for client in range(len(self.models))]

    @abstractmethod
    def _played(self, sampled: Sequence[int]) -> Cost:
        """What this method does in a round."""

    def _answers(self, client: int, pictures: Tensor) -> Tensor:
        """What a client takes pictures for [b]."""
        return self.models[client](pictures).argmax(1)

    def _train(self, client: int, networks: Sequence[Classifier], loss: Loss) -> float:
        """Train networks on a client's samples by plain SGD; returns the operations that it took.

        Raises:
            ConfigError: The loss is no number any more.
        """
        parameters = [parameter for network in networks for parameter in network.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=self._hyper.learning_rate)
        for pictures, labels in self._batches(client):
            value = loss(pictures, labels)
            check_loss(value.item(), type(self).__name__, self._round, self._federation.clients[client], self._hyper)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        samples = self._hyper.epochs * self._samples(client)
        return sum(training_flops(network.flops, samples) for network in networks)

    def _samples(self, client: int) -> int:
        """How many samples a client trains on."""
        return len(self._federation.clients[client].train.labels)

    def _mean(self, modules: Sequence[nn.Module], sampled: Sequence[int]) -> State:
        """Mean of what a round's clients hold, each client counting as much as it has samples."""
        samples = [self._samples(client) for client in sampled]
        states: list[State] = [module.state_dict() for module in modules]
        return {
            name: torch.stack([state[name] * (n / sum(samples)) for state, n in zip(states, samples, strict=True)]).sum(
                0
            )
            for name in states[0]
        }

    def _class_means(self, client: int) -> tuple[ClassMeans, float]:
        """A client's mean representations, and the operations that it took to find them."""
        body, train = self.models[client].body, self._federation.clients[client].train
        with torch.no_grad():
            parts = [body(pictures) for pictures in _in_parts(train.images)]
        found, counts = np.unique(train.labels, return_counts=True)
        means = torch.stack([torch.cat(parts)[torch.from_numpy(train.labels == label)].mean(0) for label in found])
        flops = float(forward_flops(self.models[client].cnn)) * len(train.labels)
        return ClassMeans(torch.from_numpy(found), means, torch.from_numpy(counts)), flops

    def _batches(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a client's round, in an order that follows from seed, round and client alone."""
        train, hyper = self._federation.clients[client].train, self._hyper
        random = np.random.default_rng((hyper.seed, self._round, client))
        for _ in range(hyper.epochs):
            order = random.permutation(len(train.labels))
            for first in range(0, len(order), hyper.batch):
                rows = order[first : first + hyper.batch]
                yield as_pictures(train.images[rows]), torch.from_numpy(train.labels[rows])

    def _accuracy(self, client: int) -> float:
        test = self._federation.clients[client].test
        with torch.no_grad():
            answers = torch.cat([self._answers(client, pictures) for pictures in _in_parts(test.images)])
        return float(np.mean(answers.numpy() == test.labels))


def initial(cnn: Cnn, classes: int, seed: int, place: int) -> Classifier:
    """A classifier with torch's initial values, which follow from the seed and the place alone.

    Args:
        cnn: Its body.
        classes: How many classes it tells apart.
        seed: Of all initial values.
        place: The client's place in its federation, or :data:`SHARED`.
    """
    state = np.random.SeedSequence((seed, place - SHARED)).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(state[0]))
        return Classifier(cnn, classes)


def as_pictures(images: NDArray[np.uint8]) -> Tensor:
    """Pictures as a CNN takes them: float32 from -1 to 1."""
    return torch.from_numpy(centred(images))


def classification_loss(model: Classifier) -> Loss:
    """The cross-entropy of a model's answers."""
    return lambda pictures, labels: functional.cross_entropy(model(pictures), labels)


def size_of(state: State) -> int:
    """How many numbers there are."""
    return sum(values.numel() for values in state.values())


def require_equal_models(method: str, federation: Federation, models: Sequence[Cnn]) -> None:
    """Check that all clients have one network.

    Raises:
        ConfigError: Two of them differ.
    """
    for client, cnn in zip(federation.clients, models, strict=False):
        if cnn != models[0]:
            raise ConfigError(
                f"{method} needs equal models; client {federation.clients[0].name} has {models[0]}, "
                f"and client {client.name} has {cnn}",
                "give all clients one network, or use a method that lets them differ, such as lg-fedavg",
            )


def require_equal_widths(method: str, models: Sequence[Cnn]) -> None:
    """Check that all representations have one width.

    Raises:
        ConfigError: Two of them differ.
    """
    if len(widths := sorted({cnn.representation for cnn in models})) > 1:
        raise ConfigError(
            f"{method} shares what representations are like, and their widths differ: {', '.join(map(str, widths))}",
            "give all networks one width of representation",
        )


def _in_parts(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    for first in range(0, len(images), _AT_ONCE):
        yield as_pictures(images[first : first + _AT_ONCE])
