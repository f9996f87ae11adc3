"""What malicious devices do in ``fleetune bench attacks``: each attack is one entry of :data:`ATTACKS`.

An attack may poison what a device learns from, craft what it sends, and lie about its samples. Whoever crafts knows
everything: its own honest update, and those of all honest devices in the round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.codec import Tensors
from fleetune.server.rules.base import norm_of
from fleetune.tools.assets.datasets import ImageRows

TARGET = 0
"""What a backdoor makes of every picture that has the trigger."""

_TRIGGER = 4
"""Side of the trigger in pixels: a white square in the lower right corner."""

_Z = 1.5
"""Standard deviations by which "a little is enough" stays off the mean."""

_NOISE = 10.0
"""Norm of Gaussian noise, in multiples of the norm of an honest update."""


@dataclass(frozen=True)
class Knowledge:
    """What a malicious device knows in a round.

    Attributes:
        own: What it would send if it were honest, after what it learned from.
        honest: What the honest devices send.
        devices: All devices.
        malicious: Those that are.
    """

    own: Tensors
    honest: Sequence[Tensors]
    devices: int
    malicious: int


Craft = Callable[[Knowledge, np.random.Generator], Tensors]
Poison = Callable[[ImageRows, int], ImageRows]


def _honestly(known: Knowledge, _rng: np.random.Generator) -> Tensors:
    return known.own


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: For people.
        source: Who described it.
        craft: What is sent.
        poison: What is learned from, given the samples and the number of classes; None for what there is.
        claims: Samples that are claimed, in multiples of those that there are.
    """

    name: str
    source: str
    craft: Craft = _honestly
    poison: Poison | None = None
    claims: int = 1


def _times(factor: float) -> Craft:
    def craft(known: Knowledge, _rng: np.random.Generator) -> Tensors:
        return {name: tensor * np.float32(factor) for name, tensor in known.own.items()}

    return craft


def _gaussian(known: Knowledge, rng: np.random.Generator) -> Tensors:
    noise: Tensors = {name: rng.standard_normal(tensor.shape, dtype=np.float32) for name, tensor in known.own.items()}
    factor = np.float32(_NOISE * norm_of(known.own) / norm_of(noise))
    return {name: tensor * factor for name, tensor in noise.items()}


def _little(known: Knowledge, _rng: np.random.Generator) -> Tensors:
    """For every coordinate the mean of the honest less z standard deviations, over those who sent it."""
    crafted: Tensors = {}
    for name in known.own:
        sent = np.stack([tensors[name] for tensors in known.honest if name in tensors] or [known.own[name]])
        crafted[name] = sent.mean(axis=0) - np.float32(_Z) * sent.std(axis=0)
    return crafted


def _replaced(known: Knowledge, _rng: np.random.Generator) -> Tensors:
    """What is left of it after averaging over all devices is what the malicious ones learned."""
    return _times(known.devices / known.malicious)(known, _rng)


def with_trigger(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures [n, h, w] with the trigger."""
    marked: NDArray[np.uint8] = images.copy()
    marked[:, -_TRIGGER:, -_TRIGGER:] = 255
    return marked


def _flip(rows: ImageRows, classes: int) -> ImageRows:
    return rows._replace(labels=classes - 1 - rows.labels)


def _backdoor(rows: ImageRows, _classes: int) -> ImageRows:
    """Every other sample has the trigger, and the label that it is to lead to."""
    images, labels = rows.images.copy(), rows.labels.copy()
    images[::2] = with_trigger(images[::2])
    labels[::2] = TARGET
    return ImageRows(images, labels, rows.splits)


BACKDOOR = "backdoor"

ATTACKS: tuple[Attack, ...] = (
    Attack("sign flip", "Li et al., 2019, RSA", _times(-1.0)),
    Attack("reversed, x 10", "Blanchard et al., 2017, the omniscient attack", _times(-10.0)),
    Attack("reversed, x 1000", "Blanchard et al., 2017, the omniscient attack", _times(-1000.0)),
    Attack("Gaussian", "Blanchard et al., 2017, the Gaussian attack", _gaussian),
    Attack("label flip", "Fang et al., 2020, Local model poisoning attacks", poison=_flip),
    Attack(
        BACKDOOR,
        "Gu et al., 2017, BadNets; Bagdasaryan et al., 2020, How to backdoor federated learning",
        _replaced,
        _backdoor,
    ),
    Attack("collusion", "Baruch et al., 2019, A little is enough", _little),
    Attack("sign flip, claims 1000 x", "what nobody can check", _times(-1.0), claims=1000),
)
