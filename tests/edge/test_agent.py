"""An agent over a real broker: what it hears while a round is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.agent.state import State
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.errors import BrokerProtocolError, BudgetError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Payload,
    Presence,
    UpdateManifest,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.bench.transfer.noop import NoOpAnswer, NoOpWorker

TOPICS = Topics("lab")
ME = "nano-1"


class Worker(NoOpWorker):
    """Does a round when the test lets it."""

    def __init__(self) -> None:
        super().__init__({})
        self.begun: list[int] = []
        self.go_on, self.prepared = threading.Event(), threading.Event()
        self.refuses = self.over = False

    def prepare(self, _state: State, say: Callable[[str], None]) -> None:
        while not self.prepared.wait(0.02):
            say("measures what training costs here")

    def check_fit(self, _announced: Announcement) -> None:
        if self.refuses:
            raise BudgetError("too small", "raise it")

    def answer(
        self,
        announced: Announcement,
        _tensors: Tensors,
        _progress: Callable[[float, float], None],
        pulse: Callable[[], None],
    ) -> NoOpAnswer:
        self.begun.append(announced.version)
        while not self.go_on.wait(0.02):
            pulse()
            if self.over:
                raise BrokerProtocolError("the test is over", "")
        return NoOpAnswer()


class Bench:
    """An agent that runs, and the aggregator that it talks to."""

    def __init__(self, broker: BrokerAddress, state: Path, *, prepares: bool = False) -> None:
        self.worker = Worker()
        if not prepares:
            self.worker.prepared.set()
        self.manifests: list[UpdateManifest] = []
        self.said: list[Presence] = []
        self.refusal = ""
        topics = [TOPICS.upload_manifest(ME, "+"), TOPICS.presence(ME)]
        self.link = Link(broker, "aggregator", subscriptions=topics)
        self.link.connect()
        self.agent = Agent(AgentConfig(ME, "lab", broker, state), self.worker)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.wait(lambda: bool(self.said))

    def _run(self) -> None:
        with pytest.raises(BrokerProtocolError, match="the test is over"):
            self.agent.run()

    def announce(self, version: int, job: str = "fedms", **changes: Any) -> None:
        announced = Announcement(
            fleet="lab", run="r", job=job, version=version, method="fedms", stage="global", round=1, rounds=6,
            backbone="b", quantisation="nf4", settings={}, issued=time.time(), expires=time.time() + 60,
            **changes,
        )  # fmt: skip
        self.link.publish(TOPICS.current(job), seal(announced), retain=True)

    def withdraw(self) -> None:
        self.link.publish(TOPICS.current("fedms"), b"", retain=True)

    def wait(self, until: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, self.said[-3:]
            for event in self.link.events(0.02):
                if isinstance(event, Received) and event.topic.endswith("/m"):
                    manifest = open_envelope(event.payload, UpdateManifest)
                    self.manifests.append(manifest)
                    ack = Ack(manifest.update, accepted=not self.refusal, reason=self.refusal)
                    self.link.publish(TOPICS.down(ME, "ack"), seal(ack))
                elif isinstance(event, Received):
                    self.said.append(open_envelope(event.payload, Presence))

    def listen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > end)

    def close(self) -> None:
        self.worker.go_on.clear()
        self.worker.over, self.worker.refuses = True, False
        self.announce(99)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.link.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with embedded_broker(free_port()) as broker:
        bench = Bench(broker, tmp_path / "state")
        yield bench
        bench.close()


def test_a_round_that_a_broker_tells_again_while_it_is_under_way_is_done_once(bench: Bench) -> None:
    """As it does when it was away for a moment: announcements are retained."""
    bench.announce(3)
    bench.wait(lambda: bench.worker.begun == [3])
    bench.announce(3)
    bench.listen(0.5)
    bench.worker.go_on.set()
    bench.wait(lambda: len(bench.manifests) == 1)
    bench.listen(0.5)
    assert bench.worker.begun == [3]
    assert [manifest.version for manifest in bench.manifests] == [3]
    bench.announce(4)
    bench.wait(lambda: len(bench.manifests) == 2)
    assert bench.worker.begun == [3, 4]


def test_a_newer_round_that_is_announced_meanwhile_comes_next(bench: Bench) -> None:
    bench.announce(3)
    bench.wait(lambda: bench.worker.begun == [3])
    bench.announce(4)
    bench.listen(0.3)
    bench.worker.go_on.set()
    bench.wait(lambda: len(bench.manifests) == 2)
    assert [manifest.version for manifest in bench.manifests] == [3, 4]


def test_an_aggregator_that_comes_back_hears_once_more_why_a_device_declined(bench: Bench) -> None:
    bench.worker.refuses = True
    bench.announce(3)
    bench.wait(lambda: bench.said[-1].state == "declined")
    bench.withdraw()  # too few devices were left
    bench.wait(lambda: bench.said[-1].state == "idle")
    bench.announce(3)
    bench.wait(lambda: bench.said[-1].state == "declined")
    assert "too small" in bench.said[-1].detail
    assert bench.worker.begun == []


def test_a_round_whose_tensors_are_larger_than_the_jobs_is_declined_and_the_next_one_done(bench: Bench) -> None:
    bench.announce(3, whole=Payload("f32", "ab" * 32, 1 << 40, 65536))
    bench.wait(lambda: bench.said[-1].state == "declined")
    assert f"{1 << 40} bytes announced" in bench.said[-1].detail
    bench.listen(0.5)  # it looks again, now and then, for what it lacks
    bench.worker.go_on.set()
    bench.announce(4)
    bench.wait(lambda: [manifest.version for manifest in bench.manifests] == [4])


def test_what_is_declined_while_the_agent_gets_ready_stays_declined(tmp_path: Path) -> None:
    with embedded_broker(free_port()) as broker:
        bench = Bench(broker, tmp_path / "state", prepares=True)
        bench.announce(3, whole=Payload("f32", "ab" * 32, 1 << 40, 65536))
        bench.wait(lambda: "declined" in [presence.state for presence in bench.said])
        bench.worker.prepared.set()
        bench.listen(0.5)
        assert bench.said[-1].state == "declined"
        bench.close()


def test_a_device_remembers_few_jobs_however_many_are_announced(bench: Bench) -> None:
    bench.announce(3, job="job-0")
    bench.wait(lambda: bench.worker.begun == [3])
    for number in range(1, 40):
        bench.announce(3, job=f"job-{number}")
    bench.listen(0.5)
    bench.worker.go_on.set()
    bench.wait(lambda: len(bench.manifests) >= 17)
    bench.listen(0.5)
    assert {manifest.job for manifest in bench.manifests} == {"job-0", *(f"job-{n}" for n in range(24, 40))}


def test_a_device_that_is_kept_out_says_why_and_takes_part_again_when_it_is_let_in(bench: Bench) -> None:
    bench.refusal = "quarantined"
    bench.worker.go_on.set()
    bench.announce(3)
    bench.wait(lambda: bench.said[-1].state == "declined")
    assert "quarantined" in bench.said[-1].detail
    assert "--readmit" in bench.said[-1].detail
    bench.refusal = ""
    bench.announce(4)
    bench.wait(lambda: [manifest.version for manifest in bench.manifests] == [3, 4])
    bench.listen(0.3)
    assert bench.said[-1].state == "idle"
