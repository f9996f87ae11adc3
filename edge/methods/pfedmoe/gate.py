"""How much the shared and the private representation count: from a network for each sample, or without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.parameters import Parameters, initial
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.protocol.modelfile import GateKind

FloatArray = NDArray[np.float32]
Weights = tuple[FloatArray, FloatArray]
"""Of the shared and of the private representation, each [n, m]; their sum is 1."""

MOMENTUM = 0.1
"""Share of a new batch in the running means and variances, as in torch."""

RUNNING = "running."
"""What the names of running means and variances begin with."""

_LAST = "gate.norm2.weight"


class Gate(Protocol):
    """Weighs two representations.

    Attributes:
        learned: What is trained; empty if nothing is.
        gradient: Its gradient, after :meth:`backward`.
    """

    learned: Parameters
    gradient: Parameters

    def forward(self, x: FloatArray) -> Weights:
        """Weights of a batch of training samples.

        Args:
            x: What the gate sees of them [n, inputs].
        """
        ...

    def backward(self, x: FloatArray, upstream: Weights, /) -> None:
        """Replace :attr:`gradient`.

        Args:
            x: As before.
            upstream: Gradient of the loss with respect to the weights.
        """
        ...

    def weights(self, x: FloatArray) -> Weights:
        """Weights of samples that nothing is learned from."""
        ...

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """All that is kept from round to round: full name → tensor."""
        ...

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite those of the named tensors that are its own."""
        ...


class SampleGate:
    """``softmax(BN(σ(BN(SN(x) W₁ + b₁)) W₂ + b₂))``, SN being switchable normalisation (Yi et al., 2024, figure 3).

    It is trained over whole batches, whose means and variances also enter running ones; these count elsewhere. A batch
    of one sample has no variance and enters none. The weight of the last normalisation begins at zero, so that a fresh
    gate weighs both equally: at one it would tell samples apart by its random initial values.

    Args:
        sessions: The pack's graphs.
        inputs: Width of what it sees.
        hidden: Width of its hidden layer.
        representation: Width of what it weighs, m.
        seed: Seed of its initial values.
    """

    def __init__(self, sessions: Sessions, inputs: int, hidden: int, representation: int, seed: int) -> None:
        self._sessions, self._width = sessions, representation
        self.learned = initial_gate(inputs, hidden, seed)
        self.gradient = self.learned.blank()
        self._running = {
            f"{RUNNING}{name}": np.full(shape, float(name.endswith(".variance")), dtype=np.float32)
            for name, shape in running_shapes(inputs, hidden).items()
        }

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """What is trained, and running means and variances."""
        return self.learned.tensors | self._running

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite those of the named tensors that are its own."""
        self.learned.load({name: tensor for name, tensor in tensors.items() if name in self.learned.tensors})
        for name, tensor in self._running.items():
            tensor[...] = tensors.get(name, tensor)

    def forward(self, x: FloatArray) -> Weights:
        """Weights of a batch, normalised over it."""
        found = self._sessions.run("gate_train", {"x": x, **self.learned.tensors})
        alpha = found.pop("alpha")
        if len(x) > 1:
            for name, value in found.items():
                unbiased = value * (len(x) / (len(x) - 1)) if name.endswith("variance") else value
                running = self._running[f"{RUNNING}{name}"]
                running += MOMENTUM * (unbiased - running)
        return self._spread(alpha)

    def backward(self, x: FloatArray, upstream: Weights) -> None:
        """Replace the gradient."""
        of_alpha = np.stack([part.sum(axis=1) for part in upstream], axis=1)
        found = self._sessions.run("gate_backward", {"x": x, **self.learned.tensors, "gradient": of_alpha})
        self.gradient.load({name.removeprefix("grad."): value for name, value in found.items()})

    def weights(self, x: FloatArray) -> Weights:
        """Weights of samples, normalised by running means and variances."""
        return self._spread(self._sessions.run("gate", {"x": x, **self.learned.tensors, **self._running})["alpha"])

    def _spread(self, alpha: FloatArray) -> Weights:
        shape = (len(alpha), self._width)
        shared, private = (np.ascontiguousarray(np.broadcast_to(alpha[:, i : i + 1], shape)) for i in range(2))
        return shared, private


class FixedGate:
    """One half each, always: what a gate is compared with."""

    def __init__(self, representation: int) -> None:
        self._width = representation
        self.learned, self.gradient = Parameters({}), Parameters({})
        self.tensors: Mapping[str, FloatArray] = {}

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """There is nothing to overwrite."""

    def forward(self, x: FloatArray) -> Weights:
        """One half each."""
        return self.weights(x)

    def backward(self, _x: FloatArray, _upstream: Weights) -> None:
        """Nothing is learned."""

    def weights(self, x: FloatArray) -> Weights:
        """One half each."""
        half = np.full((len(x), self._width), 0.5, dtype=np.float32)
        return half, half


class ElementGate:
    """One weight for each element of the representation, the same for all samples (pFedAFM: Yi et al., 2024).

    ``α = σ(a)`` for the shared one and ``1 − α`` for the private one, with a = 0 to begin with.
    """

    def __init__(self, representation: int) -> None:
        self.learned = Parameters({"gate.element": (representation,)}, what="the gate")
        self.gradient = self.learned.blank()

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """What is trained."""
        return self.learned.tensors

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Overwrite those of the named tensors that are its own."""
        self.learned.load({name: tensor for name, tensor in tensors.items() if name in self.learned.tensors})

    def forward(self, x: FloatArray) -> Weights:
        """The same weights for every sample."""
        return self.weights(x)

    def backward(self, _x: FloatArray, upstream: Weights) -> None:
        """Replace the gradient: ``dα/da = α (1 − α)``."""
        alpha = self._alpha()
        self.gradient.vector[...] = (upstream[0] - upstream[1]).sum(axis=0) * alpha * (1 - alpha)

    def weights(self, x: FloatArray) -> Weights:
        """The same weights for every sample."""
        shared = np.ascontiguousarray(np.broadcast_to(self._alpha(), (len(x), len(self.learned.vector))))
        return shared, 1 - shared

    def _alpha(self) -> FloatArray:
        found: FloatArray = (1 / (1 + np.exp(-self.learned.vector))).astype(np.float32)
        return found


def gate_shapes(inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of what a gate learns.

    Args:
        inputs: Width of what it sees.
        hidden: Width of its hidden layer.
    """
    return {
        "gate.switch.weight": (inputs,),
        "gate.switch.bias": (inputs,),
        "gate.switch.mean_weight": (2,),
        "gate.switch.variance_weight": (2,),
        "gate.fc1.weight": (inputs, hidden),
        "gate.fc1.bias": (hidden,),
        "gate.norm1.weight": (hidden,),
        "gate.norm1.bias": (hidden,),
        "gate.fc2.weight": (hidden, 2),
        "gate.fc2.bias": (2,),
        "gate.norm2.weight": (2,),
        "gate.norm2.bias": (2,),
    }


def running_shapes(inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of the means and variances that a gate's normalisations keep."""
    widths = {"switch": inputs, "norm1": hidden, "norm2": 2}
    return {f"{norm}.{what}": (1, width) for norm, width in widths.items() for what in ("mean", "variance")}


def initial_gate(inputs: int, hidden: int, seed: int) -> Parameters:
    """What a gate that sees so many numbers learns, as it begins."""
    shapes = gate_shapes(inputs, hidden)
    maps = {name: shape for name, shape in shapes.items() if name.startswith("gate.fc")}
    found = Parameters(shapes, what="the gate")
    found.load(initial(maps, seed).tensors)
    ones = [name for name in shapes if name not in maps and not name.endswith(".bias") and name != _LAST]
    found.load({name: np.ones(found.tensors[name].shape) for name in ones})
    return found


def gate_of(kind: GateKind, sessions: Sessions, inputs: int, hidden: int, representation: int, *, seed: int) -> Gate:
    """A gate as it begins.

    Args:
        kind: What weighs.
        sessions: The pack's graphs.
        inputs: Width of what it sees.
        hidden: Width of its hidden layer.
        representation: Width of what it weighs.
        seed: Seed of its initial values.
    """
    if kind == "fixed":
        return FixedGate(representation)
    if kind == "element":
        return ElementGate(representation)
    return SampleGate(sessions, inputs, hidden, representation, seed)
