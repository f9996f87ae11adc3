"""pFedMoE as in its paper: private CNNs that are trained whole, by the code that devices train mixtures with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.optimiser import Sgd
from fleetune.edge.engine.parameters import Parameters, initial
from fleetune.edge.engine.prefix import split
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.methods.pfedmoe.body import NetworkBody
from fleetune.edge.methods.pfedmoe.extractor import Extractor, centred
from fleetune.edge.methods.pfedmoe.gate import Gate, gate_of
from fleetune.edge.methods.pfedmoe.mixture import HEADER, Mixture
from fleetune.edge.protocol.modelfile import GateKind
from fleetune.tools.experiment.base import Client, Cost, Federation, Hyper, check_loss
from fleetune.tools.experiment.flops import forward_flops, header_flops, training_flops
from fleetune.tools.pack.extractors import SHARED_CNN, SIDE, Cnn
from fleetune.tools.pack.mixture import BODY, EXTRACTOR, GATE, network_graphs

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

INPUTS = 3 * SIDE * SIDE
"""Width of what the gate sees: a flattened picture."""

_CHUNK = 256


@dataclass(frozen=True)
class Weighing:
    """What weighs both representations, and what that learns from.

    Attributes:
        gate: What weighs both representations.
        held_out: Share of a client's training samples that the gate alone learns from; 0 for none, and it learns from
            those that all else learns from.
    """

    gate: GateKind = "sample"
    held_out: float = 0.0


class _Pictures:
    """All samples of a client, those for training first."""

    def __init__(self, client: Client) -> None:
        self._images = np.concatenate([client.train.images, client.test.images])
        self.labels = np.concatenate([client.train.labels, client.test.labels])
        self.train = np.arange(len(client.train.labels))
        self.test = np.arange(len(client.train.labels), len(self.labels))

    def __call__(self, indices: Indices) -> Mapping[str, FloatArray]:
        return {"sample": centred(self._images[indices])}

    def flat(self, indices: Indices) -> FloatArray:
        return self(indices)["sample"].reshape(len(indices), INPUTS)


@dataclass(frozen=True)
class _Own:
    """What never leaves a client."""

    pictures: _Pictures
    sessions: Sessions
    body: Parameters
    header: Parameters
    gate: Gate
    kept: Parameters


class PFedMoE:
    """Every client has a CNN of its own; all share the body of CNN-5.

    Args:
        federation: The clients.
        models: The private model of each.
        hyper: Hyper-parameters.
        own: What weighs both representations.
    """

    def __init__(
        self, federation: Federation, models: Sequence[Cnn], hyper: Hyper, own: Weighing | None = None
    ) -> None:
        self._federation, self._hyper, self._own = federation, hyper, own or Weighing()
        self._scratch = tempfile.TemporaryDirectory(prefix="fleetune-experiment-")
        shared = {f"{EXTRACTOR}{name}": shape for name, shape in SHARED_CNN.shapes.items()}
        self.shared = initial(shared, hyper.seed, what="the extractor")
        self._round = 0
        gate = 2 * (INPUTS + 2) * GATE if self._own.gate == "sample" else 0
        around = forward_flops(SHARED_CNN) + header_flops(SHARED_CNN, federation.classes) + gate
        self._flops = [forward_flops(model) + around for model in models]
        graphs: dict[Cnn, Sessions] = {}
        self._clients = []
        for number, (client, model) in enumerate(zip(federation.clients, models, strict=True)):
            if model not in graphs:
                graphs[model] = _write(Path(self._scratch.name) / str(len(graphs)), model, hyper.threads)
            seed, width = hyper.seed * 1000 + number + 1, SHARED_CNN.representation
            header = dict(zip(HEADER, ((width, federation.classes), (federation.classes,)), strict=True))
            self._clients.append(
                _Own(
                    _Pictures(client),
                    graphs[model],
                    initial({f"{BODY}{name}": shape for name, shape in model.shapes.items()}, seed),
                    initial(header, seed),
                    gate_of(self._own.gate, graphs[model], INPUTS, GATE, width, seed=seed),
                    Parameters(shared, self.shared.vector.copy()),
                )
            )

    def _mixture(self, own: _Own) -> Mixture:
        extractor = Extractor(own.sessions, own.kept, own.pictures, chunk=_CHUNK)
        body = NetworkBody(own.sessions, own.body, own.pictures)
        return Mixture(extractor, body, own.header, own.gate, own.pictures.flat)

    def play(self, sampled: Sequence[int]) -> Cost:
        """One round: the extractor goes down, is trained with all else, and goes up."""
        self._round += 1
        total = np.zeros_like(self.shared.vector, dtype=np.float64)
        weights = [len(self._clients[number].pictures.train) for number in sampled]
        for number, weight in zip(sampled, weights, strict=True):
            own = self._clients[number]
            own.kept.vector[...] = self.shared.vector
            self._train(number, own)
            total += weight / sum(weights) * own.kept.vector
        self.shared.vector[...] = total
        flops = sum(
            training_flops(self._flops[number], weight * self._hyper.epochs)
            for number, weight in zip(sampled, weights, strict=True)
        )
        return Cost(2 * len(sampled) * self.shared.vector.size, flops)

    def _train(self, number: int, own: _Own) -> None:
        def check(loss: float) -> None:
            check_loss(loss, type(self).__name__, self._round, self._federation.clients[number], self._hyper)

        rng = np.random.default_rng([self._hyper.seed, self._round, number])
        mixture, labels, train = self._mixture(own), own.pictures.labels, own.pictures.train
        held = rng.permutation(train)[: int(self._own.held_out * len(train))]
        rates = self._hyper.shared_learning_rate, None, None, self._hyper.gate_learning_rate
        steps = [
            (part.vector, gradient.vector, Sgd(part.vector.size, rate or self._hyper.learning_rate, momentum=0.0))
            for (part, gradient), rate in zip(mixture.parts, rates, strict=True)
        ]
        for _ in range(self._hyper.epochs):
            for batch in split(rng.permutation(np.setdiff1d(train, held)), self._hyper.batch):
                check(mixture.gradient(batch, labels[batch]))
                for vector, gradient, optimiser in steps[: 3 if len(held) else 4]:
                    optimiser.step(vector, gradient)
            for batch in split(held, self._hyper.batch):
                check(mixture.gate_gradient(batch, labels[batch]))
                vector, gradient, optimiser = steps[3]
                optimiser.step(vector, gradient)

    def accuracies(self) -> list[float]:
        """Of each client's whole mixture, with the extractor as it last trained it."""
        found = []
        for own in self._clients:
            test = own.pictures.test
            logits = self._mixture(own).scores(test).mixture
            found.append(float((logits.argmax(axis=1) == own.pictures.labels[test]).mean()))
        return found


def _write(folder: Path, model: Cnn, threads: int) -> Sessions:
    folder.mkdir()
    for stem, graph in network_graphs(model, SHARED_CNN).items():
        (folder / f"{stem}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    return Sessions(folder, threads)
