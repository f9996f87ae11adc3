"""What happens in a run of the chaos benchmark: everything that a seed decides."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from fleetune.tools.bench.transfer.noop import Shapes, lora_shapes

DEVICES = {"d1": 1, "d2": 1, "d3": 2}
"""Device → samples, the weight of its updates. Whoever answers, they add up to what divides 12."""

Kind = Literal[
    "kill-device",
    "kill-aggregator",
    "kill-broker",
    "cut",
    "slow",
    "full-device",
    "full-aggregator",
    "clock-device",
    "clock-aggregator",
    "garble",
    "lose-device",
]

_FIRST: tuple[Kind, ...] = (
    "kill-device",
    "kill-aggregator",
    "garble",
    "full-device",
    "kill-broker",
    "clock-aggregator",
    "cut",
    "lose-device",
    "full-aggregator",
    "kill-device",
    "clock-device",
    "slow",
)
"""A dozen seeds in a row meet every kind."""

_SECOND: tuple[Kind, ...] = (
    "kill-device",
    "kill-aggregator",
    "kill-broker",
    "cut",
    "full-device",
    "full-aggregator",
    "clock-device",
    "clock-aggregator",
)

_LATEST_S = 0.7
"""Seconds after a round's start in which a fault may come: about as long as a round takes."""

_LATE_SHARE = 0.25
"""Of the runs, those in which updates may come late."""

_HOUR, _YEAR = 3600, 365 * 24 * 3600

Habit = Literal["twice", "swap", "flip"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: What.
        device: Whose, where it is a device's.
        version: Version of the announcement after which it comes.
        delay_s: Seconds between the two.
        jump_s: Seconds that a clock jumps.
        habits: What is done to messages; all through the run.
    """

    kind: Kind
    device: str
    version: int
    delay_s: float
    jump_s: int = 0
    habits: tuple[Habit, ...] = ()

    def __str__(self) -> str:
        where = f" of {self.device}" if self.kind not in ("kill-aggregator", "kill-broker") else ""
        if self.kind.endswith("-aggregator"):
            where = ""
        if self.kind == "garble":
            return f"garble{where}: {', '.join(self.habits)}"
        jump = f" by {self.jump_s:+d} s" if self.jump_s else ""
        return f"{self.kind}{where}{jump}, {self.delay_s:.2f} s after version {self.version}"


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        seed: What it was drawn from.
        rounds: Rounds in which devices train.
        shapes: Tensors that travel.
        quorum: Answers that close a round without those who are away.
        checkpoint_rounds: Rounds after which the aggregator keeps a checkpoint.
        faults: What goes wrong.
        buffer: Updates after which a round closes, so that others come late; None to wait for all.
    """

    seed: int
    rounds: int
    shapes: Shapes
    quorum: int
    checkpoint_rounds: int
    faults: tuple[Fault, ...]
    buffer: int | None = None

    def __str__(self) -> str:
        late = f"rounds of {self.buffer} updates; " if self.buffer is not None else ""
        return f"seed {self.seed}: {late}{'; '.join(map(str, self.faults))}"


def plan_of(seed: int) -> Plan:
    """The run of a seed.

    Its job has a round that prepares (version 0), those that train, and one more that prepares, with which the last
    global tensors go down.
    """
    rng = random.Random(seed)  # noqa: S311 - repeated on purpose
    first = _FIRST[seed % len(_FIRST)]
    rounds = 2 if first == "slow" else rng.randint(3, 5)
    blocks, width = (2, 640) if first == "slow" else rng.choice([(2, 640), (2, 768), (3, 768), (4, 640)])
    kinds = [first] + ([rng.choice(_SECOND)] if rng.random() < 0.5 else [])
    return Plan(
        seed=seed,
        rounds=rounds,
        shapes=lora_shapes(blocks=blocks, width=width),  # 3, 4, 5 or 6 chunks in float32
        quorum=2 if first == "lose-device" else len(DEVICES),
        checkpoint_rounds=rng.choice([1, 2, 16]),
        faults=tuple(_fault(kind, rng, rounds) for kind in kinds),
        buffer=2 if first not in ("lose-device", "slow") and rng.random() < _LATE_SHARE else None,
    )


def _fault(kind: Kind, rng: random.Random, rounds: int) -> Fault:
    version = rounds if kind == "slow" else rng.randint(0, rounds + 1)  # slow to the end, which must not be far
    habits: tuple[Habit, ...] = ()
    if kind == "garble":
        habits = tuple(rng.sample(["twice", "swap", "flip"], rng.randint(1, 3)))
    return Fault(
        kind=kind,
        device=rng.choice(sorted(DEVICES)),
        version=version,
        delay_s=rng.uniform(0, _LATEST_S if kind != "slow" else 0.2),
        jump_s=rng.choice([-_YEAR, -_HOUR, _HOUR, _YEAR]) if kind.startswith("clock") else 0,
        habits=habits,
    )
