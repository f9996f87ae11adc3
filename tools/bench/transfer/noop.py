"""Rounds in which nobody trains: what is left is what Fleetune itself takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.agent.state import State
from fleetune.edge.agent.worker import Metrics
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.identity.folder import Identity, read_identity
from fleetune.edge.protocol.messages import Announcement

FLEET = "bench"
JOB = "noop"
BACKBONE = "0" * 64
Shapes = dict[str, tuple[int, ...]]


class NoOpSpec(msgspec.Struct, frozen=True):
    """What a process of the benchmark is to do; the same for the aggregator and for devices.

    Attributes:
        host: Where the broker is.
        port: Its port.
        folder: For state.
        devices: Ids: the fleet's for the aggregator, those of one process for devices.
        shapes: Tensors that travel.
        rounds: Rounds.
        codec: How tensors become bytes, both ways.
        buffer: Updates that close a round; None for all devices.
        quorum: Answers that close a round without those who are away; None for all devices.
        identities: Folder with an identity for each device and for ``aggregator``; empty to sign nothing.
        tls: Whether the broker speaks TLS.
    """

    host: str
    port: int
    folder: str
    devices: tuple[str, ...]
    shapes: Shapes
    rounds: int = 1
    codec: str = "f32"
    buffer: int | None = None
    quorum: int | None = None
    identities: str = ""
    tls: bool = False

    @property
    def broker(self) -> BrokerAddress:
        """Where the broker is."""
        return BrokerAddress(self.host, self.port, self.tls)

    def identity(self, name: str) -> Identity | None:
        """Who a device is, or the aggregator."""
        return read_identity(Path(self.identities) / name) if self.identities else None


def lora_shapes(blocks: int = 12, width: int = 768, rank: int = 8, targets: tuple[str, ...] = ("q", "v")) -> Shapes:
    """Name → shape of the adapters of a transformer."""
    return {
        f"blocks.{block}.{target}.{side}": shape
        for block in range(blocks)
        for target in targets
        for side, shape in (("A", (width, rank)), ("B", (rank, width)))
    }


@dataclass(frozen=True)
class NoOpAnswer:
    """What goes up."""

    metrics: Metrics = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


class NoOpWorker:
    """Answers at once, with noise of given shapes that never changes.

    Args:
        shapes: Name → shape.
        samples: Weight of its updates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, samples: int = 1) -> None:
        self.samples = samples
        self.facts: Metrics = {}
        self._shapes = shapes
        self._tensors: Tensors = {}
        if shapes:  # an agent without a pack draws nothing, and need not hold what draws
            rng = np.random.default_rng(0)
            self._tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    def prepare(self, state: State, say: Callable[[str], None]) -> None:
        """Nothing to get ready."""

    def check_fit(self, announced: Announcement) -> None:
        """Everything suits it."""

    def shapes(self, announced: Announcement) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002
        """Its own, whatever the job."""
        return self._shapes

    def hindrance(self, announced: Announcement) -> str:  # noqa: ARG002
        """Nothing hinders it."""
        return ""

    def answer(
        self,
        announced: Announcement,
        tensors: Tensors,  # noqa: ARG002
        progress: Callable[[float, float], None],  # noqa: ARG002
        pulse: Callable[[], None],  # noqa: ARG002
    ) -> NoOpAnswer:
        """The tensors, in a round that asks for some."""
        return NoOpAnswer(tensors=self._tensors if announced.stage == "global" else {})

    def forget(self) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to let go of."""
