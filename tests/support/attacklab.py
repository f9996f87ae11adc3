"""A live fleet on Mosquitto with certificates, and somebody who wants to harm it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import EXACT
from fleetune.edge.protocol.errors import BrokerProtocolError, IdentityError
from fleetune.edge.protocol.identity.folder import Identity, read_identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Event, Link
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.edge.protocol.topics import Topics
from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.authority.authority import Authority
from fleetune.server.job import Job
from fleetune.server.journal import FILE as JOURNAL
from fleetune.server.journal import Accepted, Journal, read_records
from fleetune.tools.bench.transfer.noop import BACKBONE, FLEET, NoOpAnswer, NoOpWorker
from fleetune.tools.secured import Secured, secured

TOPICS = Topics(FLEET)
SHAPES = {"head.bias": (2,), "head.weight": (2, 8)}
JOB = Job(
    id="fedms", method="fedms", backbone=BACKBONE, quantisation="nf4", shapes=SHAPES,
    rounds={"global": 2, "personal": 0}, settings={"max_depth": 1}, codec="f32",
)  # fmt: skip
HONEST = ("nano-1", "nano-2")
MALLORY = "mallory"
"""A device of the fleet that somebody else has taken over."""

Tensors = Mapping[str, NDArray[np.float32]]


def tensors_of(device: str) -> dict[str, NDArray[np.float32]]:
    """What an honest device sends in every round."""
    seed = sum(device.encode())
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


class Worker(NoOpWorker):
    """Trains when the test lets it."""

    def __init__(self, device: str) -> None:
        super().__init__(SHAPES)
        self.begun: list[Announcement] = []
        self.may, self.over = threading.Semaphore(0), False
        self._device = device

    def answer(
        self,
        announced: Announcement,
        _tensors: Tensors,
        _progress: Callable[[float, float], None],
        pulse: Callable[[], None],
    ) -> NoOpAnswer:
        self.begun.append(announced)
        if announced.stage != "global":
            return NoOpAnswer()
        while not self.may.acquire(timeout=0.02):
            pulse()
            if self.over:
                raise BrokerProtocolError("the test is over", "none")
        return NoOpAnswer(tensors=tensors_of(self._device))


@dataclass
class Lab:
    """The fleet.

    Attributes:
        secured: Broker, authority and identities.
        folder: For state.
        members: Devices without which no round closes.
        patience: Seconds that a round waits for others.
    """

    secured: Secured
    folder: Path
    members: tuple[str, ...] = HONEST
    patience: float = 0.0
    workers: dict[str, Worker] = field(default_factory=dict)
    _aggregator: Future[None] = field(default_factory=Future)
    _threads: list[threading.Thread] = field(default_factory=list)

    def update_of(self, device: str, tensors: Tensors) -> tuple[UpdateManifest, bytes]:
        """What a device would send in the round that is open."""
        announced = next(iter(self.workers.values())).begun[-1]
        data = EXACT.encode(dict(tensors))
        manifest = UpdateManifest(
            fleet=FLEET, device=device, update=f"{announced.run}-{JOB.id}-{announced.version}", run=announced.run,
            job=JOB.id, version=announced.version, issued=0.0, backbone=BACKBONE, samples=1, metrics={},
            payload=chunks.describe(data, EXACT.name),
        )  # fmt: skip
        return manifest, data

    def identity(self, name: str) -> Identity:
        return read_identity(self.secured.identities / name)

    def authority(self) -> closing[Authority]:
        return closing(Authority(self.secured.authority))

    # --- the fleet ----------------------------------------------------------------------------------------------

    def start(self, *devices: str) -> None:
        """Run the aggregator, and some devices that train when they may."""
        config = AggregatorConfig(
            *(FLEET, self.secured.address, self.folder / "aggregator", (JOB,)),
            devices=frozenset((*self.members, MALLORY)),
            quorum=len(self.members),
            away_s=self.patience,
            keep_history=True,
            deadline_s=max(0.2, self.patience),
            identity=self.identity("aggregator"),
        )
        self._threads.append(threading.Thread(target=self._lead, args=[config], daemon=True))
        for device in devices or self.members:
            worker = self.workers[device] = Worker(device)
            agent = AgentConfig(
                *(device, FLEET, self.secured.address, self.folder / device, "f32"), identity=self.identity(device)
            )
            self._threads.append(threading.Thread(target=self._serve, args=[agent, worker], daemon=True))
        for thread in self._threads:
            thread.start()

    def _lead(self, config: AggregatorConfig) -> None:
        try:
            Aggregator(config).run()
        except Exception as error:  # noqa: BLE001 - whoever waits for the aggregator is told
            self._aggregator.set_exception(error)
        else:
            self._aggregator.set_result(None)

    @staticmethod
    def _serve(config: AgentConfig, worker: Worker) -> None:
        with suppress(BrokerProtocolError, IdentityError):  # denied, or put out
            Agent(config, worker).run()

    def await_round(self, version: int) -> None:
        """Until every device trains in a round; version 0 only prepares."""
        self.wait(lambda: all(any(one.version == version for one in w.begun) for w in self.workers.values()))

    def finish(self) -> None:
        """Let devices train to the end of the job."""
        for worker in self.workers.values():
            worker.may.release(10)
        self._aggregator.result(20)

    def close(self) -> None:
        """End what runs."""
        for worker in self.workers.values():
            worker.over = True

    @staticmethod
    def wait(until: Callable[[], bool], seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.02)

    # --- what came of it ----------------------------------------------------------------------------------------

    def accepted(self) -> list[Accepted]:
        """Updates in the journal."""
        path = self.folder / "aggregator" / JOURNAL
        return [record for record in read_records(path) if isinstance(record, Accepted)] if path.exists() else []

    def gained(self, version: int) -> Tensors:
        """What the global tensors were after a round, less the initial ones."""
        with closing(Journal(self.folder / "aggregator", keep_history=True)) as journal:
            return journal.load_globals(JOB.id, version)

    def counts(self, device: str, seconds: float = 1.5) -> bool:
        """Whether tensors of a device get into the journal, within some seconds; even those that damage it."""
        path, name = self.folder / "aggregator" / JOURNAL, f'"device":"{device}"'.encode()
        with suppress(AssertionError):
            self.wait(lambda: any(name in line and b'"payload":{' in line for line in path.open("rb")), seconds)
            return True
        return False

    def came_out_right(self) -> bool:
        """Whether the sum of all rounds is that of the honest devices, and of nobody else."""
        mean = {
            name: np.mean([tensors_of(device)[name] for device in self.members], axis=0, dtype=np.float64)
            for name in SHAPES
        }
        found = self.gained(2)
        return all(np.allclose(found[name], 2 * mean[name], rtol=1e-5) for name in SHAPES)


class Intruder:
    """Speaks MQTT under some identity, and says what it likes."""

    def __init__(
        self, lab: Lab, identity: Identity, *topics: str, will: tuple[str, msgspec.Struct] | None = None
    ) -> None:
        self.seals = Seals(identity)
        self.heard: list[Event] = []
        self.link = Link(
            lab.secured.address,
            "intruder",
            subscriptions=topics or ("nothing",),
            seals=self.seals,
            will=None if will is None else lambda: will,
        )
        self.link.connect(5.0)
        self.publish(TOPICS.introduction(identity.credential.name), identity.envelope, retain=True)

    def __enter__(self) -> Intruder:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> list[Event]:
        """Send a message, and wait until the broker has it; what happened meanwhile."""
        self.link.publish(topic, payload, retain=retain)
        return self.listen(until=lambda: self.link.idle)

    def say(self, topic: str, message: msgspec.Struct, *, retain: bool = False) -> list[Event]:
        """The same with a message that is signed by this side."""
        return self.publish(topic, self.seals.seal(topic, message), retain=retain)

    def listen(self, until: Callable[[], bool], seconds: float = 5.0) -> list[Event]:
        end, found = time.monotonic() + seconds, list[Event]()
        while time.monotonic() < end:
            new = list(self.link.events(0.05))
            found += new
            self.heard += new
            if until():
                break
        return found

    def die(self) -> None:
        """Go without a word: the broker says the last will."""
        sock = self.link._client.socket()
        assert sock is not None
        sock.shutdown(socket.SHUT_RDWR)

    def send(self, device: str, manifest: UpdateManifest, data: bytes, *, envelope: bytes = b"") -> list[Event]:
        """Send an update, in one chunk."""
        topic = TOPICS.upload_manifest(device, manifest.update)
        found = self.publish(topic, envelope or self.seals.seal(topic, manifest))
        return found + self.publish(TOPICS.upload_chunk(device, manifest.update, 0), data)


@contextmanager
def attack_lab(folder: Path) -> Iterator[Lab]:
    """A secured fleet, not yet started."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lab = Lab(stack.enter_context(secured(folder / "fleet", FLEET, (*HONEST, MALLORY))), folder)
        stack.callback(lab.close)
        Intruder(
            lab, lab.identity(HONEST[0])
        ).link.close()  # now the broker has set itself up, and may be told to reload
        yield lab


def complaints(caplog: pytest.LogCaptureFixture, reason: str, about: str = "") -> list[str]:
    """Log lines that say why something was refused."""
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in lines if f"({reason})" in line and about in line]
