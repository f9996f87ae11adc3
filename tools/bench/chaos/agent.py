"""An agent without a pack, for the chaos benchmark: what it sends is its own, and differs from round to round."""

from __future__ import annotations

import logging
import random
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import EXACT, Tensors
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.link import Received
from fleetune.edge.protocol.messages import Announcement
from fleetune.tools.bench.chaos.process import ChaosSpec, bend_clock
from fleetune.tools.bench.transfer.noop import FLEET, NoOpAnswer, NoOpWorker

_UNIT = 840
"""What every value is a multiple of: so its weighted mean over whoever answers is exact in float32."""

_TRAINING_S = (0.02, 0.2)


def sent(device: str, version: int, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """What a device adds to the global tensors in a round: no two devices and no two rounds have the same."""
    rng = np.random.default_rng([zlib.crc32(device.encode()), version])
    return {name: rng.integers(-500, 500, shape).astype(np.float32) * _UNIT for name, shape in sorted(shapes.items())}


class ChaosWorker(NoOpWorker):
    """Takes a moment, then answers with what follows from its name and the round.

    Args:
        spec: What it is to do.
    """

    def __init__(self, spec: ChaosSpec) -> None:
        super().__init__({}, samples=spec.samples)
        self._spec = spec

    def shapes(self, announced: Announcement) -> Shapes:  # noqa: ARG002
        """Those that travel."""
        return self._spec.shapes

    def answer(
        self,
        announced: Announcement,
        tensors: Tensors,
        progress: Callable[[float, float], None],  # noqa: ARG002
        pulse: Callable[[], None],
    ) -> NoOpAnswer:
        """The tensors, in a round that asks for some."""
        write_atomic(Path(self._spec.given), EXACT.encode(tensors), sync=False)
        until = time.monotonic() + random.uniform(*_TRAINING_S)  # noqa: S311
        while time.monotonic() < until:
            time.sleep(0.01)
            pulse()
        trains = announced.stage == "global"
        return NoOpAnswer(tensors=sent(self._spec.devices[0], announced.version, self._spec.shapes) if trains else {})


class ChaosAgent(Agent):
    """An agent that keeps what it is told of its updates where no full disk can take it."""

    def __init__(self, spec: ChaosSpec) -> None:
        device = spec.devices[0]
        config = AgentConfig(device, FLEET, BrokerAddress(spec.host, spec.port), Path(spec.folder), spec.codec)
        super().__init__(config, ChaosWorker(spec))
        self._heard_log = Path(spec.heard)

    def _receive(self, event: Received) -> None:
        if event.topic.endswith("/ack"):
            with self._heard_log.open("ab") as file:
                file.write(event.payload + b"\n")
        super()._receive(event)


def main(path: str) -> None:
    """Serve until the process is killed."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d %(levelname)s %(message)s")
    spec = msgspec.json.decode(Path(path).read_bytes(), type=ChaosSpec)
    bend_clock(spec.clock)
    ChaosAgent(spec).run()


if __name__ == "__main__":
    main(sys.argv[1])
