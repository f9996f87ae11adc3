"""Whole sequences of what comes over the network, as the aggregator and the agent take them."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.broadcasts import Broadcasts
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import CODECS, Codec, Tensors
from fleetune.edge.protocol.errors import FleetuneError, MessageError, RunFailedError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Announcement, Missing, Need, encode, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.intake import Intake
from fleetune.server.journal import Announced, Started
from fleetune.server.strategies.base import NextRound
from fleetune.server.training import Training
from fleetune.tools.bench.transfer.noop import NoOpAnswer, NoOpWorker
from fuzz.choices import Choices
from fuzz.documents import ANNOUNCEMENT, JOB, SHAPES, TENSORS, UPDATE
from fuzz.mutations import mutate_bytes, mutate_sealed, mutate_tensors
from fuzz.target import MIB, Target
from fuzz.targets.messages import ACK, PRESENCE

TOPICS = Topics("lab")
NOWHERE = BrokerAddress("127.0.0.1", 1)


def post(link: Link, topic: str, payload: bytes, *, retained: bool = False) -> None:
    """Put a message where the network's thread would."""
    link._queued += len(payload)
    link._events.put(Received(topic, payload, retained))


# --- the aggregator ---------------------------------------------------------------------------------------------


class Leading(Aggregator):
    """An aggregator in the middle of a round, without a network."""

    def __init__(self, folder: Path) -> None:
        super().__init__(AggregatorConfig("lab", NOWHERE, folder, (JOB,), devices=frozenset({"nano-1", "nano-2"})))
        announced = msgspec.structs.replace(ANNOUNCEMENT, whole=None, since=None, changes=None)
        self._run = Started("r", "lab", (JOB,))
        training = self._training = Training(JOB, self._run, self._journal, self._store)
        self._journal.append(self._run, Announced(announced))
        training.open = training._opened(announced, NextRound("global", 2, trained=("blocks.", "head.")))
        self._intake = Intake(
            *(self._link, TOPICS, "r", JOB, self._journal, self._store, self._registry, self._quarantine, []),
            max_staleness=2,
        )
        self._leadership.claimed = True
        training.globals.add(dict(TENSORS))
        training.globals.tell(("",))
        self._announce(fresh=False)

    def take(self) -> None:
        self._pump(0.0)
        self._check_quorum()
        assert self._open is not None
        assert all(np.isfinite(tensor).all() for tensor in self._open.gain().values())
        self._in_words(self._registry.members())

    def post(self, topic: str, payload: bytes, *, retained: bool) -> None:
        post(self._link, topic, payload, retained=retained)

    def end(self) -> None:
        self._store.close()
        self._journal.close()


def aggregator(data: bytes, folder: Path) -> None:
    """Manifests and chunks of good and bad updates, presences, announcements, wishes; on right and wrong topics."""
    choices, leading = Choices(data), Leading(folder / "aggregator")
    try:
        for number in range(8):
            if choices.spent:
                break
            for topic, payload in _post(choices, number):
                leading.post(topic, payload, retained=choices.below(4) == 3)
            leading.take()
    finally:
        leading.end()


def _post(choices: Choices, number: int) -> list[tuple[str, bytes]]:
    device = choices.pick(["nano-1", "nano-1", "nano-2", "stranger"])
    kind = choices.below(8)
    if kind <= 3:
        return _update(choices, device, number)
    if kind == 4:
        heard = msgspec.structs.replace(PRESENCE, name=device, boot=choices.below(4))
        return [(TOPICS.presence(device), _odd(choices, seal(heard)))]
    if kind == 5:
        wish = Need("fedms", choices.pick(["ab" * 32, chunks.describe(_WHOLE, "f32").sha256]), choices.take(9))
        return [(TOPICS.up(device, "need"), _odd(choices, seal(wish)))]
    if kind == 6:
        foreign = msgspec.structs.replace(ANNOUNCEMENT, run=choices.pick(["r", "other"]), version=choices.below(9))
        topic = choices.pick([TOPICS.current("fedms"), TOPICS.current("other")])
        return [(topic, b"" if choices.below(4) == 3 else mutate_sealed(choices, seal(foreign)))]
    return [
        (choices.pick([TOPICS.aggregator_presence, f"ft/1/lab/up/{device}/u/m", "ft/1/lab/up/+/u/m"]), choices.rest())
    ]


_WHOLE = Codec.named("f32").encode(TENSORS)


def _update(choices: Choices, device: str, number: int) -> list[tuple[str, bytes]]:
    """An update of which something may be wrong: its tensors, its manifest, its chunks."""
    named = choices.pick(CODECS)
    data = Codec.named(named).encode({"head.bias": TENSORS["head.bias"]} if choices.below(2) else TENSORS)
    odd = choices.below(4)
    if odd == 3:
        data = mutate_tensors(choices, data) or b"\0"
    manifest = msgspec.structs.replace(
        UPDATE,
        device=device,
        update=f"r-fedms-{choices.below(3)}",
        version=choices.pick([3, 3, 3, 2, 9]),
        payload=chunks.describe(data, named, choices.pick([65536, 300, 1000])),
    )
    sealed = seal(manifest) if odd != 2 else mutate_sealed(choices, seal(manifest))
    assert manifest.payload is not None
    found = [(TOPICS.upload_manifest(device, manifest.update), sealed)]
    for index, part in chunks.cut(data, manifest.payload, range(manifest.payload.chunks)):
        shown = mutate_bytes(choices, part) if odd == 1 and choices.below(2) else part
        found.append((TOPICS.upload_chunk(device, manifest.update, index + (number if odd == 1 else 0)), shown))
    return found if choices.often() else found[::-1]


def _odd(choices: Choices, raw: bytes) -> bytes:
    return mutate_sealed(choices, raw) if choices.below(2) else raw


# --- the device -------------------------------------------------------------------------------------------------


class Worker(NoOpWorker):
    """Answers at once."""

    def __init__(self) -> None:
        super().__init__(SHAPES)

    def answer(self, announced: Announcement, tensors: Tensors, *_: object) -> NoOpAnswer:
        for name, tensor in tensors.items():
            assert tensor.shape == SHAPES[name]
            assert np.isfinite(tensor).all()
        return NoOpAnswer({"loss": 0.5}, dict(TENSORS) if announced.stage == "global" else {})


class Serving(Agent):
    """An agent without a network."""

    def __init__(self, folder: Path) -> None:
        super().__init__(AgentConfig("nano-1", "lab", NOWHERE, folder), Worker())

    def post(self, topic: str, payload: bytes, *, retained: bool) -> None:
        post(self._link, topic, payload, retained=retained)

    def take(self) -> None:
        self._look_at_post(0.0)
        self._work()
        assert len(self._presence(*self._said).detail) <= 1024
        encode(self._presence(*self._said))

    def end(self) -> None:
        self._state.close()


def agent(data: bytes, folder: Path) -> None:
    """Announcements, chunks, answers and questions, right and wrong."""
    choices, serving = Choices(data), Serving(folder / "state")
    try:
        for number in range(8):
            if choices.spent:
                break
            for topic, payload in _told(choices, number):
                serving.post(topic, payload, retained=choices.below(4) == 3)
            serving.take()
    finally:
        serving.end()


def _told(choices: Choices, number: int) -> list[tuple[str, bytes]]:
    kind = choices.below(6)
    if kind <= 3:
        return _announced(choices, number)
    update = choices.pick(["r-fedms-0", "r-fedms-1", "r-fedms-2", "other"])
    if kind == 4:
        reason = choices.pick(["", "no-room", "stale-round", "wrong-run", "not-finite", "quarantined"])
        ack = msgspec.structs.replace(ACK, update=update, accepted=not reason, reason=reason)
        return [(TOPICS.down("nano-1", "ack"), _odd(choices, seal(ack)))]
    return [(TOPICS.down("nano-1", "missing"), _odd(choices, seal(Missing(update, choices.take(9)))))]


def _announced(choices: Choices, number: int) -> list[tuple[str, bytes]]:
    """A round, and the chunks of its tensors."""
    odd, job = choices.below(4), choices.pick(["fedms", "fedms", "other"])
    tensors = {name: tensor + number for name, tensor in TENSORS.items()}
    whole = Codec.named("f32").encode(tensors)
    if odd == 3:
        whole = mutate_tensors(choices, whole) or b"\0"
    payload = chunks.describe(whole, "f32", choices.pick([65536, 700]))
    named = choices.pick(CODECS)
    changes = Codec.named(named).encode(tensors)
    announced = msgspec.structs.replace(
        ANNOUNCEMENT,
        job=job,
        version=number,
        issued=time.time(),
        expires=time.time() + 60,
        stage=choices.pick(["global", "personal", "finished", "prepare"]),
        whole=payload,
        since=None,
        changes=chunks.describe(changes, named, 700) if choices.below(2) else None,
    )
    sealed = seal(announced) if odd != 2 else mutate_sealed(choices, seal(announced))
    found = [(TOPICS.current(job), sealed)]
    for sent, bytes_ in ((payload, whole), (announced.changes, changes)):
        if sent is not None:
            for index, part in chunks.cut(bytes_, sent, range(sent.chunks)):
                shown = mutate_bytes(choices, part) if odd == 1 and choices.below(2) else part
                found.append((TOPICS.broadcast_chunk(job, sent.sha256, index), shown))
    return found


def broadcasts(data: bytes, folder: Path) -> None:
    """The same for the part of a device that puts tensors together; with restarts."""
    choices, state = Choices(data), State(folder / "state", "nano-1")
    try:
        heard = Broadcasts(state, lambda _announced: SHAPES)
        for number in range(6):
            if choices.spent:
                break
            messages = _announced(choices, number)
            try:
                announced = open_envelope(messages[0][1], Announcement)
            except MessageError:
                continue
            try:
                heard.want(announced, under_way=bool(choices.below(2)))
                for topic, part in messages[1:]:
                    _, job, sha256, index = TOPICS.split(topic)
                    heard.add(job, sha256, int(index), part)
                ready = heard.ready()
                if ready is not None:
                    for name, tensor in heard.tensors(ready).items():
                        assert tensor.shape == SHAPES[name]
            except FleetuneError:
                heard.forget(announced.job)
            list(heard.overdue())
            if choices.below(3) == 2:
                state.close()
                state = State(folder / "state", "nano-1")
                heard = Broadcasts(state, lambda _announced: SHAPES)
    finally:
        state.close()


TARGETS = [
    Target("aggregator's post", Choices.rest, aggregator, (RunFailedError,), memory=4 * MIB, slow=True),
    Target("agent's post", Choices.rest, agent, (), memory=4 * MIB, slow=True),
    Target("broadcasts", Choices.rest, broadcasts, (), memory=4 * MIB, slow=True),
]
