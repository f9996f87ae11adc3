"""A device that sends far too much: it hears why, sits the round out, and takes part in the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.errors import BrokerProtocolError, RunFailedError
from fleetune.edge.protocol.messages import Announcement
from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.job import Job
from fleetune.server.journal import FILE, Closed, read_records
from fleetune.server.store import FILE as STORE
from fleetune.server.store import Store
from fleetune.tools.bench.transfer.noop import NoOpAnswer, NoOpWorker

JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", rounds={"global": 4, "personal": 0},
    shapes={"head.bias": (4,)}, settings={"max_depth": 1},
)  # fmt: skip
LAST, RUNS_WILD = 4, 2


class Worker(NoOpWorker):
    """Honest ones take a moment; the other goes wild in one round."""

    def __init__(self, *, wild: bool) -> None:
        super().__init__(JOB.shapes)
        self._wild = wild

    def answer(
        self,
        announced: Announcement,
        _tensors: Tensors,
        _progress: Callable[[float, float], None],
        pulse: Callable[[], None],
    ) -> NoOpAnswer:
        if announced.version > LAST:
            raise BrokerProtocolError("the test is over", "")
        until = time.monotonic() + (0.0 if self._wild else 0.5)
        while time.monotonic() < until:
            time.sleep(0.02)
            pulse()
        power = 1000 if self._wild and announced.version == RUNS_WILD else 1
        tensors = {"head.bias": np.full(4, power, np.float32)}
        return NoOpAnswer(tensors=tensors if announced.stage == "global" else {})


def test_a_device_that_sends_far_too_much_sits_the_round_out_and_takes_part_in_the_next(tmp_path: Path) -> None:
    with embedded_broker(free_port()) as broker:
        agents = [start_agent(broker, tmp_path, name) for name in ("a", "b", "c", "wild")]
        config = AggregatorConfig(
            "lab", broker, tmp_path / "run", (JOB,), frozenset({"a", "b", "c", "wild"}), quorum=3, keep_history=True
        )
        with pytest.raises(RunFailedError, match="the test is over"):
            Aggregator(config).run()
        for agent in agents:
            agent.join(20)
    closed = [record for record in read_records(tmp_path / "run" / FILE) if isinstance(record, Closed)]
    everybody = ["a", "b", "c", "wild"]
    assert [record.devices for record in closed] == [everybody, everybody, everybody[:3], everybody, everybody]
    store = Store(tmp_path / "run" / STORE, only_look=True)
    (wild,) = (row for row in store.devices() if row.id == "wild")
    store.close()
    assert (wild.refused, wild.reason) == (1, "norm-outlier")


def start_agent(broker: BrokerAddress, folder: Path, name: str) -> threading.Thread:
    agent = Agent(AgentConfig(name, "lab", broker, folder / name), Worker(wild=name == "wild"))

    def run() -> None:
        with pytest.raises(BrokerProtocolError, match="the test is over"):
            agent.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
