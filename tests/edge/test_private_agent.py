"""An agent over a real broker in a private job: all that leaves it, in every message that it sends."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fleetune.edge.agent import agent as module
from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.edge.agent.privacy import PrivacyLimits, PrivateAnswer, Spent
from fleetune.edge.agent.state import State
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import EXACT, Codec, Tensors
from fleetune.edge.protocol.errors import BrokerProtocolError, BudgetError, FleetuneError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Presence,
    Privacy,
    Stage,
    UpdateManifest,
    open_envelope,
    read_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.bench.transfer.noop import NoOpWorker

TOPICS = Topics("lab")
ME = "nano-1"
CLIP, NOISE = 0.5, 2.0
PRIVATE = Privacy(CLIP, NOISE)
SIZE = 15_000
SHAPES = {"head": (SIZE,)}
"""Values of an update: few enough for one chunk."""
SAMPLES = 41

SECRETS = {
    "loss": 0.6931, "val": 0.8125, "test": 0.7654, "test_mixture": 0.7421, "gate_local": 0.3141, "samples": SAMPLES,
    "plan_cpu_s": 12.345, "plan_cache_mib": 9.876, "cache_missing_mib": 5.4321,
}  # fmt: skip
"""Figures that say something of the samples."""


class Worker(NoOpWorker):
    """Trains a large update, and tells far too much of how."""

    def __init__(self) -> None:
        super().__init__({}, samples=SAMPLES)
        self.raw = np.full(SIZE, 3.0, np.float32)
        self.answers = 0
        self.error: FleetuneError | None = None
        self.hinders = ""
        self.over = False

    def check_fit(self, _announced: Announcement) -> None:
        if self.over:
            raise BrokerProtocolError("the test is over", "")
        if self.error is not None:
            raise self.error

    def hindrance(self, _announced: Announcement) -> str:
        return self.hinders

    def answer(
        self,
        announced: Announcement,
        _tensors: Tensors,
        progress: Callable[[float, float], None],
        _pulse: Callable[[], None],
    ) -> PrivateAnswer:
        self.answers += 1
        progress(0.123, SECRETS["loss"])
        time.sleep(0.6)  # longer than the agent waits before it shows where a round is
        progress(0.456, SECRETS["loss"])
        sends = announced.stage in ("global", "personal")
        return PrivateAnswer({**SECRETS, "cpu_s": 1.5, "depth": 2}, {"head": self.raw.copy()} if sends else {})


class Bench:
    """An agent that runs, and the aggregator that it talks to, which hears everything."""

    def __init__(self, broker: BrokerAddress, state: Path, limits: PrivacyLimits | None = None, codec: str = "f32"):
        self.worker, self.folder = Worker(), state
        self.manifests: list[UpdateManifest] = []
        self.payloads: list[bytes] = []
        self.said: list[Presence] = []
        self.heard: list[str] = []
        self.acknowledges = True
        topics = [TOPICS.up(ME, "#"), TOPICS.presence(ME)]
        self.link = Link(broker, "aggregator", subscriptions=topics)
        self.link.connect()
        self.config = AgentConfig(ME, "lab", broker, state, codec, privacy=limits or PrivacyLimits())
        self.agent = Agent(self.config, self.worker)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.wait(lambda: bool(self.said))

    def _run(self) -> None:
        with contextlib.suppress(FleetuneError):
            self.agent.run()

    def announce(
        self, version: int, privacy: Privacy | None = PRIVATE, *, stage: Stage = "global", at: int = 1
    ) -> None:
        announced = Announcement(
            fleet="lab", run="r", job="fedms", version=version, method="fedms", stage=stage, round=at, rounds=6,
            backbone="b", quantisation="nf4", settings={}, issued=time.time(), expires=time.time() + 60,
            privacy=privacy,
        )  # fmt: skip
        self.link.publish(TOPICS.current("fedms"), seal(announced), retain=True)

    def wait(self, until: Callable[[], bool], seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, self.said[-3:]
            for event in self.link.events(0.02):
                if isinstance(event, Received) and event.payload:
                    self._hear(TOPICS.split(event.topic), event.payload)

    def _hear(self, levels: tuple[str, ...], raw: bytes) -> None:
        if levels[0] == "up" and levels[-1].isdigit():
            self.payloads.append(raw)
            return
        self.heard.append(bytes(read_envelope(raw).body).decode())
        if levels[0] == "st":
            self.said.append(open_envelope(raw, Presence))
        elif levels[-1] == "m":
            manifest = open_envelope(raw, UpdateManifest)
            self.manifests.append(manifest)
            if self.acknowledges:
                self.link.publish(TOPICS.down(ME, "ack"), seal(Ack(manifest.update, accepted=True)))

    def answer(self, version: int, **more: Any) -> None:
        """Have a round done."""
        self.announce(version, **more)
        self.wait(lambda: bool(self.manifests) and self.manifests[-1].version == version)
        self.wait(lambda: len(self.payloads) == sum(manifest.payload is not None for manifest in self.manifests))

    def declined(self, version: int, privacy: Privacy | None = PRIVATE) -> str:
        """Why a round is declined."""
        said = len(self.said)
        self.announce(version, privacy)
        self.wait(lambda: len(self.said) > said and self.said[-1].state == "declined")
        return self.said[-1].detail

    @property
    def spent(self) -> int:
        return msgspec.json.decode((self.folder / "privacy.json").read_bytes(), type=Spent).updates

    def close(self) -> None:
        """End the agent, as SIGTERM would."""
        self.worker.over, self.worker.hinders = True, ""
        end = time.monotonic() + 20
        version = 1000
        while self._thread.is_alive():
            assert time.monotonic() < end
            version += 1
            self.announce(version, stage="evaluate")  # which no limit forbids
            self._thread.join(0.3)
        self.link.publish(TOPICS.current("fedms"), b"", retain=True)
        self.link.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Starts agents on one state folder, one after the other."""
    with embedded_broker(free_port()) as broker:
        made: list[Bench] = []

        def start(**options: Any) -> Bench:
            for before in made:
                before.close()
            made.clear()
            made.append(Bench(broker, tmp_path / "state", **options))
            return made[0]

        yield start
        for bench in made:
            bench.close()


def sent(bench: Bench, codec: str = "f32") -> NDArray[np.float64]:
    """The newest update, as it arrives."""
    return Codec.named(codec).decode(bench.payloads[-1], SHAPES)["head"].astype(np.float64)


def check_noise(values: NDArray[np.float64], spread: float, *, loss: float = 0.0) -> None:
    """That values are noise of a deviation, within six standard errors and what a codec adds to it."""
    assert abs(values.std() - spread) < spread * (6 / math.sqrt(2 * values.size) + loss)
    assert abs(values.mean()) < spread * (6 / math.sqrt(values.size) + loss)


CLIPPED = CLIP / math.sqrt(SIZE)
"""Each value of the worker's update after clipping: all are equal."""


def values(document: Any) -> Iterator[Any]:
    """Every name and value of a JSON document."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield name
            yield from values(value)
    elif isinstance(document, list):
        for value in document:
            yield from values(value)
    else:
        yield document


# --- what leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["f32", "int4"])
def test_what_leaves_is_clipped_and_has_noise(codec: str, start: Callable[..., Bench]) -> None:
    bench = start(codec=codec)
    bench.answer(1)
    found = sent(bench, codec)
    check_noise(found - CLIPPED, CLIP * NOISE, loss=0.0 if codec == "f32" else 0.05)


def test_noise_comes_before_the_codec_and_what_that_owes_later(start: Callable[..., Bench], tmp_path: Path) -> None:
    bench = start(codec="int4")
    bench.answer(1)
    bench.answer(2)
    arrived = sum(Codec.named("int4").decode(data, SHAPES)["head"].astype(np.float64) for data in bench.payloads)
    start()  # another agent, so that nobody has the folder
    (file,) = (tmp_path / "state" / "outbox").glob("*-2.update")
    manifest, _, rest = file.read_bytes().partition(b"\n")
    lost = EXACT.decode(rest[json.loads(manifest)["payload"]["size"] :], SHAPES)["head"].astype(np.float64)
    assert 0 < np.abs(lost).max() < 2 * CLIP * NOISE  # of the raw update's 3.0 the codec would owe more
    check_noise(arrived + lost - 2 * CLIPPED, math.sqrt(2) * CLIP * NOISE)


@pytest.mark.parametrize("stage", ["prepare", "global", "personal", "evaluate"])
def test_no_message_says_anything_of_the_samples(stage: Stage, start: Callable[..., Bench]) -> None:
    bench = start()
    bench.announce(1, stage=stage)
    bench.wait(lambda: bool(bench.manifests) and bench.said[-1].state == "idle")
    (manifest,) = bench.manifests
    assert manifest.samples == 1
    assert manifest.noise == NOISE
    assert manifest.metrics.keys() == {"cpu_s", "depth", "bytes_up", "bytes_down", "boot"}
    for text in bench.heard:
        leaves = set(values(json.loads(text)))
        assert not leaves & {*SECRETS.values(), 0.123, 0.456}, text  # or how many steps there are
        assert not (SECRETS.keys() - {"samples"}) & leaves, text


def test_the_same_job_without_privacy_tells_all_of_it(start: Callable[..., Bench]) -> None:
    """Or the test above would find nothing."""
    bench = start()
    bench.answer(1, privacy=None)
    bench.wait(lambda: bench.said[-1].state == "idle")
    assert bench.manifests[0].samples == SAMPLES
    heard = "".join(bench.heard)
    for name, value in SECRETS.items():
        assert f'"{name}":{value}' in heard
    assert '"progress":0.456' in heard
    np.testing.assert_array_equal(sent(bench), bench.worker.raw)


def test_accuracies_leave_at_the_end_if_they_are_asked_for(start: Callable[..., Bench]) -> None:
    bench = start()
    for version, stage, at in ((1, "global", 6), (2, "evaluate", 6)):
        bench.answer(version, privacy=Privacy(CLIP, NOISE, accuracy=True), stage=stage, at=at)
    first, last = (set(manifest.metrics) & set(SECRETS) for manifest in bench.manifests)
    assert (first, last) == (set(), {"test", "test_mixture"})


def test_why_a_device_waits_or_declines_says_nothing_of_its_samples(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.1)
    bench = start()
    bench.worker.hinders = "lacks 12.345 CPU s for its 41 samples"
    bench.announce(1)
    bench.wait(lambda: bench.said[-1].detail.startswith("waits: "))
    bench.worker.error = BudgetError("lacks 12.345 CPU s for its 41 samples", "raise it")
    assert "exit code 14" in bench.declined(2)
    assert not any("12.345" in text or "41 samples" in text for text in bench.heard)


# --- once more ----------------------------------------------------------------------------------------------


def test_an_update_that_is_sent_again_is_the_same_one(start: Callable[..., Bench]) -> None:
    """Two answers to one round with noise of their own would be two looks at the same samples."""
    bench = start()
    bench.acknowledges = False
    bench.answer(1)
    bench = start()  # the agent has restarted, and the aggregator has not heard it
    bench.announce(1)
    bench.wait(lambda: bool(bench.payloads))
    again = bench.payloads[-1]
    assert bench.worker.answers == 0
    assert bench.spent == 1
    bench = start()
    bench.announce(1)
    bench.wait(lambda: bool(bench.payloads))
    assert bench.payloads[-1] == again


def test_of_a_round_that_a_crash_cut_off_nothing_has_left(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained again with other noise; that counts as one more, though nobody has seen the first."""

    def crash(*_args: Any) -> None:
        raise BrokerProtocolError("the power is gone", "")

    bench = start()
    with monkeypatch.context() as broken:
        broken.setattr(State, "put_outbox", crash)
        bench.announce(1)
        bench.wait(lambda: bench.worker.answers == 1 and not bench._thread.is_alive())
    bench.wait(lambda: bench.said[-1].state in ("offline", "failed"))
    assert bench.manifests == bench.payloads == []
    bench = start()
    bench.answer(1)
    check_noise(sent(bench) - CLIPPED, CLIP * NOISE)
    assert bench.spent == 2
    assert len(bench.manifests) == 1


def test_an_update_that_waits_for_room_keeps_its_noise_and_counts_once(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.1)
    tried: list[bytes] = []
    put = State.put_outbox

    def full(state: State, manifest: UpdateManifest, data: bytes, lost: bytes = b"") -> None:
        tried.append(data)
        if len(tried) < 3:
            raise OSError(28, "No space left on device")
        put(state, manifest, data, lost)

    monkeypatch.setattr(State, "put_outbox", full)
    bench = start()
    bench.answer(1)
    assert len(tried) == 3
    assert set(tried) == {bench.payloads[-1]}
    assert bench.spent == 1
    assert bench.worker.answers == 1


# --- the owner's limits -------------------------------------------------------------------------------------

LIMITS = PrivacyLimits(min_noise=1.5, max_updates=2)


def test_a_job_with_too_little_noise_gets_nothing(start: Callable[..., Bench]) -> None:
    bench = start(limits=LIMITS)
    assert "adds noise of 0 times" in bench.declined(1, None)
    assert "adds noise of 1.4 times" in bench.declined(2, Privacy(CLIP, 1.4))
    assert bench.worker.answers == 0
    assert bench.manifests == bench.payloads == []
    bench.answer(3)
    check_noise(sent(bench) - CLIPPED, CLIP * NOISE)


def test_when_the_owners_updates_are_spent_nothing_more_leaves(start: Callable[..., Bench]) -> None:
    bench = start(limits=LIMITS)
    bench.answer(1)
    bench.answer(2)
    assert "its owner allows 2" in bench.declined(3)
    before = set(bench.payloads)
    bench = start(limits=LIMITS)
    assert "its owner allows 2" in bench.declined(4)
    assert bench.worker.answers == 0
    assert set(bench.payloads) <= before  # one that it does not know to have arrived, once more


def test_what_a_round_without_noise_owes_does_not_leave_with_a_private_one(start: Callable[..., Bench]) -> None:
    """An owner who sets a limit in mid-run would find it broken by the codec's debts."""
    bench = start(codec="int4")
    bench.worker.raw = np.linspace(-1000, 1000, SIZE, dtype=np.float32)  # the codec owes up to 70 of each value
    bench.answer(1, privacy=None)
    bench = start(codec="int4", limits=PrivacyLimits(min_noise=1.5))
    bench.answer(2)
    assert np.abs(sent(bench, "int4")).max() < 20 * CLIP * NOISE
