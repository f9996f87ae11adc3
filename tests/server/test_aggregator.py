"""A whole aggregator, over a real broker, whose devices do and say what a test tells them to."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as mqtt
import pytest
from numpy.typing import NDArray

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import RunFailedError, RunFolderError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Missing,
    Need,
    Presence,
    PresenceState,
    UpdateManifest,
    encode,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics
from fleetune.server import aggregator as module
from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.job import Job, JobPrivacy, RuleSettings
from fleetune.server.journal import FILE, Accepted, Closed, Journal, read_records
from fleetune.server.rules import RULES
from support.smalldisk import fill, small_disk

TOPICS = Topics("lab")
JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4", rounds={"global": 2, "personal": 0},
    shapes={"head.bias": (2,), "head.weight": (128, 128)}, settings={"max_depth": 1},
)  # fmt: skip
WEIGHT = (np.arange(128 * 128, dtype=np.float32) % 1024).reshape(128, 128) / 1024  # exact in float16
BIAS = np.array([1.0, -2.0], np.float32)
Tensors = Mapping[str, NDArray[np.float32]]


class Ending(Aggregator):
    """An aggregator that a test can end in the middle of a round."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__(config)
        self.ends = threading.Event()

    def _pump(self, timeout: float) -> None:
        if self.ends.is_set():
            raise RunFolderError("the test ends it", "")
        super()._pump(timeout)


class Fleet:
    """An aggregator that runs, and its devices, ``a`` and ``b`` if nothing else is said."""

    def __init__(
        self,
        broker: BrokerAddress,
        state: Path,
        max_staleness: int = 8,
        here: str | None = None,
        job: Job = JOB,
        devices: str = "ab",
        **settings: Any,
    ) -> None:
        self.state, self.devices = state, devices
        self.announced: list[Announcement] = []
        self.details: list[str] = []
        self.facts: dict[str, Any] = {}
        self.answers: list[tuple[str, Ack]] = []
        self.asked: list[tuple[str, Missing]] = []
        topics = TOPICS.current("+"), TOPICS.aggregator_presence, TOPICS.down("+", "+")
        self.link = Link(broker, "devices", subscriptions=topics)
        self.link.connect()
        for device in devices if here is None else here:
            self.say(device, "online")
        config = AggregatorConfig(
            *("lab", broker, state, (job,)),
            devices=frozenset(devices),
            max_staleness=max_staleness,
            keep_history=True,
            **{"away_s": 0.1, **settings},
        )
        self._running: Future[None] = Future()
        threading.Thread(target=self._run, args=(config,), daemon=True).start()

    def _run(self, config: AggregatorConfig) -> None:
        try:
            self.aggregator = Ending(config)
            self.aggregator.run()
        except Exception as error:  # noqa: BLE001 - whoever waits for the aggregator is told
            self._running.set_exception(error)
        else:
            self._running.set_result(None)

    # --- what devices do ------------------------------------------------------------------------------------------

    def say(self, device: str, state: PresenceState) -> None:
        self.link.publish(TOPICS.presence(device), seal(Presence(device, state, boot=1, kit="1")), retain=True)

    def update(
        self,
        device: str,
        version: int,
        tensors: Tensors,
        chunk_size: int = 65536,
        samples: int = 3,
        noise: float = 0.0,
    ) -> Update:
        data = Codec.named("f16").encode(tensors) if tensors else b""
        run = self.announced[0].run
        manifest = UpdateManifest(
            fleet="lab", device=device, update=f"{run}-fedms-{version}", run=run, job="fedms", version=version,
            issued=0.0,
            backbone="b", samples=samples, metrics={},
            payload=chunks.describe(data, "f16", chunk_size) if data else None, noise=noise,
        )  # fmt: skip
        return Update(self, manifest, data)

    # --- what they hear -------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not until():
            if self._running.done():
                self._running.result()
            assert time.monotonic() < end, f"the aggregator said {self.details[-5:]}"
            for event in self.link.events(0.02):
                if isinstance(event, Received):
                    self._hear(TOPICS.split(event.topic), event.payload)

    def _hear(self, levels: tuple[str, ...], raw: bytes) -> None:
        match levels:
            case ("g", "fedms", "current") if raw:
                self.announced.append(open_envelope(raw, Announcement))
            case ("agg", "st"):
                presence = open_envelope(raw, Presence)
                self.details.append(presence.detail)
                self.facts = presence.facts
            case ("dn", device, "ack"):
                self.answers.append((device, open_envelope(raw, Ack)))
            case ("dn", device, "missing"):
                self.asked.append((device, open_envelope(raw, Missing)))

    def await_round(self, version: int) -> None:
        self.wait(lambda: any(announced.version == version for announced in self.announced))

    def await_round_again(self, version: int) -> None:
        """After a restart: the broker tells what it has kept, and then the aggregator says it."""
        self.wait(lambda: [announced.version for announced in self.announced].count(version) > 1)

    def await_answer(self, update: Update) -> Ack:
        mine = update.manifest.device, update.manifest.update
        self.wait(lambda: any((device, ack.update) == mine for device, ack in self.answers))
        return next(ack for device, ack in self.answers if (device, ack.update) == mine)

    def no_room(self) -> int:
        """How often the aggregator has found its disk full."""
        return sum(detail.startswith("no room in") for detail in self.details)

    # --- what it leaves -------------------------------------------------------------------------------------------

    def accepted(self) -> list[tuple[str, int, int]]:
        """Device, round that it answers, round that it counts in."""
        found = [record for record in read_records(self.state / FILE) if isinstance(record, Accepted)]
        return [(record.manifest.device, record.manifest.version, record.into) for record in found]

    def closed(self) -> list[tuple[list[str], int]]:
        """Who answered each round, and how many came late."""
        found = [record for record in read_records(self.state / FILE) if isinstance(record, Closed)]
        return [(record.devices, record.late) for record in found]

    def end(self) -> None:
        """Wait until the job is done."""
        self.wait(self._running.done)
        self._running.result()

    def crash(self) -> None:
        """As if it were killed: it says nothing more."""
        self.aggregator.ends.set()
        self._running.exception(timeout=20)
        self.link.close()

    def close(self) -> None:
        if not self._running.done():
            for device in self.devices:
                self.say(device, "failed")  # so that it ends, whatever it waits for
        self._running.exception(timeout=20)
        self.link.close()


class Update:
    """What a device sends up, piece by piece."""

    def __init__(self, fleet: Fleet, manifest: UpdateManifest, data: bytes) -> None:
        self.manifest = manifest
        self._fleet, self._data = fleet, data

    def announce(self) -> None:
        topic = TOPICS.upload_manifest(self.manifest.device, self.manifest.update)
        self._fleet.link.publish(topic, seal(self.manifest))

    def send_chunks(self) -> None:
        payload = self.manifest.payload
        if payload is not None:
            for index, part in chunks.cut(self._data, payload, range(payload.chunks)):
                self._fleet.link.publish(TOPICS.upload_chunk(self.manifest.device, self.manifest.update, index), part)

    def send(self) -> Update:
        self.announce()
        self.send_chunks()
        return self

    def send_as_asked(self) -> Update:
        """As a device does with what has many chunks; asked or refused."""
        asked, answered = len(self._fleet.asked), len(self._fleet.answers)
        self.announce()
        self._fleet.wait(lambda: len(self._fleet.asked) > asked or len(self._fleet.answers) > answered)
        if len(self._fleet.asked) > asked:
            self.send_chunks()
        return self


Start = Callable[..., Fleet]


@pytest.fixture
def broker() -> Iterator[BrokerAddress]:
    with embedded_broker(free_port()) as address:
        yield address


@pytest.fixture
def start(broker: BrokerAddress) -> Iterator[Start]:
    started: list[Fleet] = []

    def start(state: Path, max_staleness: int = 8, **settings: Any) -> Fleet:
        started.append(Fleet(broker, state, max_staleness, **settings))
        return started[-1]

    yield start
    for fleet in started:
        fleet.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=2048) as disk:
        yield disk


@pytest.mark.parametrize(("announced_before", "max_staleness"), [(False, 8), (True, 8), (False, 0)])
def test_a_round_that_closes_on_a_full_disk_takes_no_more_updates(
    announced_before: bool, max_staleness: int, disk: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_AGAIN", 0.2)
    unbounded = replace(JOB, rule=RuleSettings(clip=1e9))
    fleet = start(disk / "run", max_staleness, job=unbounded)
    fleet.await_round(0)
    for device in "ab":
        fleet.update(device, 0, {}).send()
    fleet.await_round(1)
    assert fleet.await_answer(fleet.update("a", 1, {"head.weight": WEIGHT}).send()).accepted
    late = fleet.update("b", 1, {"head.bias": BIAS}, chunk_size=50)
    if announced_before:
        late.announce()
        fleet.wait(lambda: fleet.asked != [])
    ballast = fill(disk, leave=40_960)  # room for that update, but not for the global tensors
    try:
        fleet.say("b", "offline")  # so that the round closes without it
        fleet.wait(lambda: fleet.no_room() > 0)

        if not announced_before:
            late.announce()
        late.send_chunks()
        tries = fleet.no_room()
        fleet.wait(lambda: fleet.no_room() >= tries + 2)
        assert [device for device, _ in fleet.answers if device == "b"] == ["b"]  # of the round before
        assert fleet.accepted() == [("a", 0, 0), ("b", 0, 0), ("a", 1, 1)]
        assert fleet.closed() == [(["a", "b"], 0)]
    finally:
        ballast.unlink()
    fleet.say("b", "online")
    fleet.await_round(2)
    assert fleet.closed()[1:] == [(["a"], 0)]
    answer = fleet.await_answer(late.send_as_asked())
    assert (answer.accepted, answer.reason) == ((True, "") if max_staleness else (False, "stale-round"))
    fleet.update("a", 2, {"head.weight": 2 * WEIGHT}).send()
    fleet.update("b", 2, {"head.bias": 4 * BIAS}).send()
    fleet.await_round(3)
    assert fleet.closed()[2:] == [(["a", "b"], int(max_staleness > 0))]
    for device in "ab":
        fleet.update(device, 3, {}).send()
    fleet.end()

    journal = Journal(fleet.state, keep_history=True)
    first, second = journal.load_globals("fedms", 1), journal.load_globals("fedms", 2)
    journal.close()
    assert list(first) == ["head.weight"]
    np.testing.assert_array_equal(first["head.weight"], WEIGHT)
    np.testing.assert_allclose(second["head.weight"], 3 * WEIGHT, rtol=1e-6)
    mean = (4 * BIAS + BIAS / np.sqrt(2)) / 2 if max_staleness else 4 * BIAS
    np.testing.assert_allclose(second["head.bias"], mean, rtol=1e-6)


def test_how_far_a_round_is_gets_said_though_the_answer_came_at_once(tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run")
    fleet.await_round(0)
    fleet.update("a", 0, {}).send()
    fleet.wait(lambda: "collects updates: 1 of 2" in fleet.details)


def test_a_quorum_begins_without_the_rest_when_the_deadline_has_passed(tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run", here="a", deadline_s=1.0)
    fleet.wait(lambda: "waits for b: 1 of 2 are there" in fleet.details)
    begun = time.monotonic()
    assert fleet.announced == []
    fleet.await_round(0)
    assert 0.5 < time.monotonic() - begun < 3


def test_a_deadline_does_not_pass_while_nobody_could_answer(tmp_path: Path) -> None:
    port = free_port()
    with embedded_broker(port) as broker:
        fleet = Fleet(broker, tmp_path / "run", deadline_s=2.0, away_s=60.0)
        fleet.await_round(0)
        fleet.update("a", 0, {}).send()
        fleet.wait(lambda: fleet.accepted() != [])
    time.sleep(3)
    assert fleet.closed() == []
    with embedded_broker(port):
        answer = fleet.update("b", 0, {})
        fleet.wait(lambda: answer.send() and "b" in dict(fleet.answers))
        fleet.await_round(1)
        assert fleet.closed() == [(["a", "b"], 0)]
        fleet.close()


@pytest.mark.parametrize("left", ["the other's", "nothing"])
def test_another_aggregator_that_was_there_meanwhile_does_not_take_the_round_from_the_devices(
    left: str, broker: BrokerAddress, tmp_path: Path, start: Start
) -> None:
    """Two met after a connection broke: the one that goes has announced its own round, and takes it back."""
    fleet = start(tmp_path / "run")
    fleet.await_round(0)
    own = fleet.announced[0]
    foreign = msgspec.structs.replace(own, run="another", version=5)
    fleet.link.publish(TOPICS.current("fedms"), seal(foreign) if left == "the other's" else b"", retain=True)
    fleet.wait(lambda: len([announced for announced in fleet.announced if announced.run == own.run]) > 1)
    later = Link(broker, "later", subscriptions=[TOPICS.current("+")])
    later.connect()
    until, kept = time.monotonic() + 5, list[bytes]()
    while not kept and time.monotonic() < until:
        kept = [event.payload for event in later.events(0.1) if isinstance(event, Received)]
    later.close()
    assert [(a.run, a.version) for a in (open_envelope(raw, Announcement) for raw in kept)] == [(own.run, 0)]
    for device in "ab":
        assert fleet.await_answer(fleet.update(device, 0, {}).send()).accepted


def test_what_an_abandoned_run_left_does_not_double_the_first_announcement(
    broker: BrokerAddress, tmp_path: Path, start: Start
) -> None:
    abandoned = Announcement(
        fleet="lab", run="old", job="fedms", version=5, method="fedms", stage="global", round=5, rounds=6,
        backbone="b", quantisation="nf4", settings={}, issued=time.time(), expires=time.time() + 60,
    )  # fmt: skip
    earlier = Link(broker, "earlier", subscriptions=[TOPICS.current("+")])
    earlier.connect()
    earlier.publish(TOPICS.current("fedms"), seal(abandoned), retain=True)
    assert any(isinstance(event, Received) for _ in range(10) for event in earlier.events(0.5))
    earlier.close()
    fleet = start(tmp_path / "run")
    fleet.wait(lambda: any(announced.run != "old" for announced in fleet.announced))
    heard = time.monotonic() + 0.5
    fleet.wait(lambda: time.monotonic() > heard)
    assert [announced.version for announced in fleet.announced if announced.run != "old"] == [0]


# --- rules ------------------------------------------------------------------------------------------------------


def answers(version: int) -> dict[str, tuple[dict[str, NDArray[np.float32]], int]]:
    """Device → what it sends in a round and the samples that it claims; one of the five lies about both."""
    rng = np.random.default_rng(version)
    sent = {
        device: ({"head.bias": rng.normal(size=2).astype(np.float32)}, 10 + place)
        for place, device in enumerate("abcde")
    }
    sent["a"][0]["head.weight"] = rng.normal(size=(128, 128)).astype(np.float32) / 64  # it trains more than others
    sent["b"] = ({"head.bias": np.array([9, -9], np.float32)}, 10**9)
    return sent


def rounds_with_globals(state: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (state / "fedms" / "globals").iterdir()}


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"median"}))  # which differs from trimmed-mean in one line
def test_a_rule_comes_to_the_same_bytes_wherever_the_aggregator_is_killed(name: str, tmp_path: Path) -> None:
    """What a kill leaves is what is on disk: copies of that are led to their end."""
    job = replace(JOB, rule=RuleSettings(name))
    left = dict[tuple[int, int], Path]()

    def lead(state: Path, version: int, done: int, *, copies: bool) -> None:
        with embedded_broker(free_port()) as broker:
            fleet = Fleet(broker, state, job=job, devices="abcde", checkpoint_rounds=1)
            fleet.await_round(version)
            while version < 4:
                waiting = list(answers(version).items())[done:]
                for device, (tensors, samples) in waiting:
                    trains = version in (1, 2)
                    sent = fleet.update(device, version, tensors if trains else {}, samples=samples).send()
                    assert fleet.await_answer(sent).accepted
                    if copies and (version, device) in ((1, "d"), (2, "a")):
                        folder = tmp_path / f"left-{version}-{device}"
                        left[version, "abcde".index(device) + 1] = Path(shutil.copytree(state, folder))
                version, done = version + 1, 0
                if version < 4:
                    fleet.await_round(version)
            fleet.end()
            fleet.close()

    lead(tmp_path / "whole", 0, 0, copies=True)
    expected = rounds_with_globals(tmp_path / "whole")
    assert expected["1.safetensors"] != expected["2.safetensors"]
    assert len(left) == 2
    for (version, done), folder in left.items():
        for file in (folder / "fedms" / "updates").iterdir():
            if int(file.stem) < version:  # a checkpoint is all that is left of them
                file.unlink()
        lead(folder, version, done, copies=False)
        assert rounds_with_globals(folder) == expected, f"killed in round {version}, after {done} updates"


# --- devices that send what nobody can use ----------------------------------------------------------------------

BAD = {"head.bias": np.array([np.nan, 1.0], np.float32)}


def send_bad(fleet: Fleet, device: str, version: int, times: int, tensors: Tensors = BAD) -> list[str]:
    """Why each of some updates was refused."""
    reasons = list[str]()
    for _ in range(times):
        update = fleet.update(device, version, tensors)
        update.manifest = msgspec.structs.replace(update.manifest, update=f"bad-{len(fleet.answers)}")
        reasons.append(fleet.await_answer(update.send()).reason)
    return reasons


def begin(fleet: Fleet) -> None:
    """Come to the first round that takes tensors."""
    fleet.await_round(0)
    for device in "ab":
        fleet.update(device, 0, {}).send()
    fleet.await_round(1)


def test_a_round_closes_without_a_device_that_is_quarantined_and_a_restart_keeps_it_out(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = start(tmp_path / "run", quorum=1)
    begin(fleet)
    assert send_bad(fleet, "a", 1, 5) == ["not-finite"] * 3 + ["quarantined"] * 2
    assert fleet.await_answer(fleet.update("a", 1, {"head.bias": BIAS}).send()).reason == "quarantined"
    fleet.wait(lambda: fleet.facts.get("quarantined") == "a: not-finite")
    assert fleet.await_answer(fleet.update("b", 1, {"head.bias": BIAS}).send()).accepted
    fleet.await_round(2)
    assert fleet.closed()[-1] == (["b"], 0)
    assert len([record for record in caplog.records if "a is quarantined" in record.message]) == 1
    fleet.crash()

    fleet = start(tmp_path / "run", quorum=1)
    fleet.await_round_again(2)
    assert send_bad(fleet, "a", 2, 1, {"head.bias": BIAS}) == ["quarantined"]
    assert fleet.await_answer(fleet.update("b", 2, {"head.bias": BIAS}).send()).accepted
    fleet.await_round(3)
    assert fleet.closed()[-1] == (["b"], 0)
    fleet.crash()

    fleet = start(tmp_path / "run", quorum=1, readmit=frozenset("a"))
    fleet.await_round_again(3)
    assert "quarantined" not in fleet.facts
    fleet.update("b", 3, {}).send()
    assert fleet.await_answer(fleet.update("a", 3, {}).send()).accepted
    fleet.end()
    assert fleet.closed()[-1] == (["a", "b"], 0)


def test_what_a_device_sent_before_it_was_quarantined_and_nobody_acknowledged_does_not_count(
    tmp_path: Path, start: Start
) -> None:
    fleet = start(tmp_path / "run", quorum=1, quarantine_after=1)
    begin(fleet)
    half = fleet.update("a", 1, {"head.weight": WEIGHT}, chunk_size=4096)
    half.announce()
    fleet.wait(lambda: fleet.asked != [])
    assert send_bad(fleet, "a", 1, 1) == ["not-finite"]
    half.send_chunks()
    fleet.update("b", 1, {}).send()
    fleet.await_round(2)
    assert fleet.accepted()[2:] == [("b", 1, 1)]


def test_too_few_that_are_not_quarantined_end_the_run_with_their_names(tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run", quorum=2)
    begin(fleet)
    send_bad(fleet, "a", 1, 2)
    fleet.update("a", 1, BAD).send()
    with pytest.raises(RunFailedError, match=r"too few devices .* \(a: quarantined: not-finite\)"):
        fleet.end()


def test_nobody_waits_for_a_quarantined_device_that_is_away(tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run", quorum=1, away_s=30.0)
    begin(fleet)
    send_bad(fleet, "a", 1, 3)
    fleet.say("a", "offline")
    fleet.crash()
    begun = time.monotonic()
    fleet = start(tmp_path / "run", here="b", quorum=1, away_s=30.0)
    fleet.await_round_again(1)
    fleet.update("b", 1, {}).send()
    fleet.await_round(2)
    assert time.monotonic() - begun < 10


# --- what may come from anyone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [
    {"test": "good", "test_global": True, "loss": "low"},
    {"test": 1e300, "val": -1e300, "loss": 2**53},
])  # fmt: skip
def test_figures_of_any_kind_stop_nobody(metrics: dict[str, Any], tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run")
    fleet.await_round(0)
    for device in "ab":
        update = fleet.update(device, 0, {})
        update.manifest = msgspec.structs.replace(update.manifest, metrics=metrics)
        assert fleet.await_answer(update.send()).accepted
    fleet.await_round(1)


@pytest.mark.parametrize("figure", [b"1" + b"0" * 305, b"1e305", b"-1e305"])
def test_a_figure_that_no_sum_can_hold_is_malformed(figure: bytes, tmp_path: Path, start: Start) -> None:
    fleet = start(tmp_path / "run")
    fleet.await_round(0)
    update = fleet.update("a", 0, {})
    body = encode(update.manifest).replace(b'"metrics":{}', b'"metrics":{"loss":%b}' % figure)
    sha256 = hashlib.sha256(body).hexdigest().encode()
    raw = b'{"body":' + body + b',"sha256":"' + sha256 + b'"}'
    fleet.link.publish(TOPICS.upload_manifest("a", update.manifest.update), raw)
    assert fleet.await_answer(update).reason == "malformed"
    for device in "ab":
        fleet.update(device, 0, {}).send()
    fleet.await_round(1)


@pytest.mark.parametrize("name", ["+", "#", "a\n2026 INFO all is well", "x" * 65_000, "", "..", "\x1b[2J"])
def test_a_topic_that_no_device_has_is_nobodys(
    name: str, broker: BrokerAddress, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded broker passes on what it should refuse."""
    fleet = start(tmp_path / "run")
    fleet.await_round(0)
    stranger = Link(broker, "stranger", subscriptions=["ft/1/lab/dn/stranger/ack"])
    stranger.connect()
    monkeypatch.setattr(mqtt.Client, "_raise_for_invalid_topic", staticmethod(lambda _topic: None))
    for topic in (f"ft/1/lab/up/{name}/u/m", f"ft/1/lab/up/a/{name}/0", f"ft/1/lab/st/{name}", f"ft/1/lab/g/{name}/x"):
        stranger.publish(topic, b"{}")
    stranger.close()
    monkeypatch.undo()
    for device in "ab":
        assert fleet.await_answer(fleet.update(device, 0, {}).send()).accepted
    fleet.await_round(1)


def test_only_the_fleets_devices_have_a_broadcast_sent_again(
    broker: BrokerAddress, tmp_path: Path, start: Start
) -> None:
    fleet = start(tmp_path / "run")
    begin(fleet)
    for device in "ab":
        fleet.update(device, 1, {"head.bias": BIAS}).send()
    fleet.await_round(2)
    whole = fleet.announced[-1].whole
    assert whole is not None
    listener = Link(broker, "listener", subscriptions=[TOPICS.repair_chunk("fedms", whole.sha256, "+")], will=None)
    listener.connect()
    need = seal(Need("fedms", whole.sha256, b"\1"))
    for device, heard in (("stranger", 0), ("a", 1)):
        fleet.link.publish(TOPICS.up(device, "need"), need)
        until = time.monotonic() + 1.5
        fleet.wait(lambda until=until: time.monotonic() > until)  # type: ignore[misc]
        assert sum(isinstance(event, Received) for event in listener.events(0.5)) == heard
    listener.close()


# --- private jobs -----------------------------------------------------------------------------------------------

PRIVACY = JobPrivacy(noise=1.0, clip=1.0, gate_clip=0.01, delta=1e-5)
SILENT = {"head.bias": np.array([1e-3, 1e-3], np.float32)}
NOISY = {"head.weight": WEIGHT, "head.bias": BIAS}


def lead_privately(state: Path, rule: str, *, crashes: bool = False) -> list[dict[str, Any]]:
    """A private job to its end, and what is said after each of its two rounds of training.

    The updates of the second are a thousand times as long as those of the first.
    """
    pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install 'fleetune[server]'")
    job, said = replace(JOB, privacy=PRIVACY, rule=RuleSettings(rule)), list[dict[str, Any]]()
    rounds = list(enumerate(({}, SILENT, NOISY, {})))
    for some in (rounds[:2], rounds[2:]) if crashes else (rounds,):
        with embedded_broker(free_port()) as broker:
            fleet = Fleet(broker, state, job=job)
            for version, tensors in some:
                fleet.await_round(version)
                if version in (2, 3):  # the file is there before the next round is announced
                    said.append(json.loads((state / "fedms" / "privacy.json").read_text()))
                for device in "ab":
                    sent = fleet.update(device, version, tensors, samples=1, noise=1.0).send()
                    assert fleet.await_answer(sent).accepted
            assert fleet.announced[-1].privacy == PRIVACY.of(fleet.announced[-1].stage)
            if some[-1] is rounds[-1]:
                fleet.end()
                fleet.close()
            else:
                fleet.await_round(2)
                fleet.crash()
    return said


@pytest.mark.parametrize("crashes", [False, True])
def test_nothing_that_a_device_sent_before_decides_how_a_private_update_counts(crashes: bool, tmp_path: Path) -> None:
    """Bounds that follow from updates would carry something of them into a sum that has no noise for it."""
    said = lead_privately(tmp_path / "run", "mean", crashes=crashes)
    journal = Journal(tmp_path / "run")
    np.testing.assert_allclose(journal.load_globals("fedms", 2)["head.weight"], WEIGHT, rtol=1e-6)
    journal.close()
    assert [(one["rounds"], one["most_updates"], one["fewest_devices"]) for one in said] == [(1, 1, 2), (2, 2, 2)]
    assert said[1]["epsilon"]["model"] < said[1]["epsilon"]["device"] == said[1]["epsilon"]["aggregator"]


def test_under_another_rule_than_the_mean_nobody_hides_behind_others(tmp_path: Path) -> None:
    said = lead_privately(tmp_path / "run", "median")
    assert said[1]["epsilon"]["model"] == said[1]["epsilon"]["aggregator"]
    assert said[1]["fewest_devices"] == 1
