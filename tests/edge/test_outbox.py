"""Updates on their way up: over a real broker, to an aggregator that asks for what a test tells it to ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from fleetune.edge.agent import outbox as module
from fleetune.edge.agent.outbox import Outbox
from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Ack, Missing, UpdateManifest, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import embedded_broker, free_port
from support.brokers import mosquitto

TOPICS = Topics("lab")
ME = "nano-1"
SOON = 1.0
"""Seconds after which an update is announced again, in these tests."""

DATA = bytes(range(256)) * 10


def update(number: int, data: bytes = DATA, *, run: str = "r", chunk_size: int = 100) -> UpdateManifest:
    return UpdateManifest(
        fleet="lab", device=ME, update=f"{run}-fedms-{number}", run=run, job="fedms", version=number, issued=0.0,
        backbone="b",
        samples=5, metrics={}, payload=chunks.describe(data, "f16", chunk_size) if data else None,
    )  # fmt: skip


class Device:
    """A device's outbox and link, without the rest of the agent."""

    def __init__(self, folder: Path, broker: BrokerAddress) -> None:
        self.state = State(folder, ME)
        self.link = Link(broker, ME, subscriptions=[TOPICS.down(ME, "+")])
        self.link.connect()
        self.outbox = Outbox(self.state, self.link, TOPICS)
        self.runs = {"r"}

    def put(self, manifest: UpdateManifest, data: bytes = DATA) -> UpdateManifest:
        self.state.enter(manifest.run)
        self.state.put_outbox(manifest, data if manifest.payload else b"")
        return manifest

    def pump(self) -> None:
        for event in self.link.events(0.01):
            if isinstance(event, Received) and event.topic.endswith("ack"):
                self.outbox.acknowledge(open_envelope(event.payload, Ack))
            elif isinstance(event, Received):
                self.outbox.missing(open_envelope(event.payload, Missing))
        self.outbox.send(self.runs)

    def waiting(self) -> list[str]:
        return [manifest.update for manifest in self.state.outbox()]

    def close(self) -> None:
        self.link.close()
        self.state.close()


class Bench:
    """A device that can be restarted, and what an aggregator hears of it."""

    def __init__(self, folder: Path, broker: BrokerAddress) -> None:
        self._folder, self._broker = folder, broker
        self.manifests: list[UpdateManifest] = []
        self.parts: list[tuple[str, int, bytes]] = []
        self.aggregator = Link(broker, "aggregator", subscriptions=[TOPICS.upload_chunk("+", "+", "+")])
        self.aggregator.connect()
        self.device = Device(folder, broker)

    def restart(self) -> Device:
        self.device.close()
        self.device = Device(self._folder, self._broker)
        return self.device

    def pump(self, seconds: float = 0.0, until: Callable[[], bool] = lambda: False) -> None:
        """Let both sides go on, for so long or until something is so."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self.device.pump()
            for event in self.aggregator.events(0.01):
                if isinstance(event, Received):
                    _, device, name, last = TOPICS.split(event.topic)
                    assert device == ME
                    if last == "m":
                        self.manifests.append(open_envelope(event.payload, UpdateManifest))
                    else:
                        self.parts.append((name, int(last), event.payload))

    def await_manifests(self, count: int) -> None:
        self.pump(10, lambda: len(self.manifests) >= count)
        assert len(self.manifests) == count

    def await_parts(self, count: int) -> list[int]:
        """Numbers of the chunks that came, once there are so many and no more."""
        self.pump(10, lambda: len(self.parts) >= count)
        self.pump(0.1)
        return [index for _, index, _ in self.parts]

    def ask(self, manifest: UpdateManifest, indices: Iterable[int]) -> None:
        assert manifest.payload is not None
        bitmap = chunks.pack_bitmap(indices, manifest.payload.chunks)
        self.aggregator.publish(TOPICS.down(ME, "missing"), seal(Missing(manifest.update, bitmap)))

    def answer(self, manifest: UpdateManifest, reason: str = "") -> None:
        ack = Ack(manifest.update, accepted=not reason, reason=reason)
        self.aggregator.publish(TOPICS.down(ME, "ack"), seal(ack))

    def close(self) -> None:
        self.device.close()
        self.aggregator.close()


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerAddress]:
    with embedded_broker(free_port()) as address:
        yield address


@pytest.fixture
def bench(broker: BrokerAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(module, "_ASK_AGAIN", SOON)
    bench = Bench(tmp_path / "state", broker)
    yield bench
    bench.close()


def test_a_single_chunk_follows_its_manifest_at_once(bench: Bench) -> None:
    one = bench.device.put(update(1, chunk_size=4096))
    assert bench.await_parts(1) == [0]
    assert bench.manifests == [one]
    assert bench.parts == [(one.update, 0, DATA)]
    bench.answer(one)
    bench.pump(10, lambda: not bench.device.waiting())
    assert bench.device.waiting() == []


def test_an_update_without_tensors_is_a_manifest(bench: Bench) -> None:
    one = bench.device.put(update(1, b""))
    bench.await_manifests(1)
    bench.answer(one)
    bench.pump(10, lambda: not bench.device.waiting())
    assert (bench.device.waiting(), bench.manifests, bench.parts) == ([], [one], [])


def test_many_chunks_wait_until_they_are_asked_for_and_only_those_are_sent(bench: Bench) -> None:
    one = bench.device.put(update(1))
    bench.await_manifests(1)
    bench.pump(0.1)
    assert bench.parts == []
    bench.ask(one, [3, 0, 25])
    assert bench.await_parts(3) == [0, 3, 25]
    assert [part for _, _, part in bench.parts] == [DATA[:100], DATA[300:400], DATA[2500:]]


def test_an_update_that_nobody_answers_is_announced_again_but_not_at_once(bench: Bench) -> None:
    bench.device.put(update(1))
    bench.await_manifests(1)
    bench.pump(SOON * 0.7)
    assert len(bench.manifests) == 1
    bench.pump(10, lambda: len(bench.manifests) >= 3)
    assert bench.manifests == [update(1)] * 3


def test_after_the_last_chunk_the_aggregator_has_time_to_answer(bench: Bench) -> None:
    one = bench.device.put(update(1))
    bench.await_manifests(1)
    bench.pump(SOON * 0.3)
    bench.ask(one, range(26))
    bench.await_parts(26)
    bench.pump(SOON * 0.6)
    assert len(bench.manifests) == 1
    bench.await_manifests(2)  # then it is announced again, and the aggregator says what it lacks
    bench.ask(one, [7])
    assert bench.await_parts(27)[26:] == [7]


def test_a_device_that_was_killed_goes_on_with_what_is_missing(bench: Bench) -> None:
    one = bench.device.put(update(1))
    bench.await_manifests(1)
    bench.ask(one, range(10))
    assert bench.await_parts(10) == list(range(10))
    bench.restart()
    bench.await_manifests(2)
    assert bench.manifests == [one, one]
    bench.ask(one, range(10, 26))
    assert bench.await_parts(26) == list(range(26))
    assert b"".join(part for _, _, part in bench.parts) == DATA


def test_who_asks_anew_gets_no_more_of_what_was_asked_for_before(bench: Bench) -> None:
    data = bytes(4 << 20)
    one = bench.device.put(update(1, data, chunk_size=4096), data)
    bench.await_manifests(1)
    bench.ask(one, range(1024))
    bench.ask(one, [1023])
    bench.await_parts(2)
    bench.pump(0.3)
    assert len(bench.parts) < 900
    assert bench.parts[-1][1] == 1023


def test_a_request_for_another_update_is_not_answered(bench: Bench) -> None:
    one, two = bench.device.put(update(1)), bench.device.put(update(2))
    bench.await_manifests(1)
    for other in (two, update(3)):
        bench.ask(other, range(26))
    bench.pump(0.2)
    assert bench.parts == []
    bench.ask(one, [0])
    assert bench.await_parts(1) == [0]


@pytest.mark.parametrize("reason", ["no-room", "wrong-chunk", "wrong-hash"])
def test_what_is_refused_for_now_waits_and_is_announced_again(reason: str, bench: Bench) -> None:
    one = bench.device.put(update(1))
    bench.await_manifests(1)
    bench.pump(SOON * 0.3)
    bench.answer(one, reason)
    bench.pump(SOON * 0.6)
    assert bench.device.waiting() == [one.update]
    assert len(bench.manifests) == 1
    bench.await_manifests(2)


@pytest.mark.parametrize("reason", ["stale-round", "wrong-backbone", "unexpected-tensor"])
def test_what_is_refused_for_good_is_let_go_and_the_next_has_its_turn(reason: str, bench: Bench) -> None:
    one, two = bench.device.put(update(1)), bench.device.put(update(2))
    bench.await_manifests(1)
    bench.answer(one, reason)
    bench.await_manifests(2)
    assert bench.manifests == [one, two]
    assert bench.device.waiting() == [two.update]
    bench.restart()
    assert bench.device.waiting() == [two.update]


def test_an_answer_says_which_update_was_let_go(bench: Bench) -> None:
    one = bench.device.put(update(1))
    outbox = bench.device.outbox
    assert outbox.acknowledge(Ack("r-fedms-9", accepted=True)) is None
    assert outbox.acknowledge(Ack(one.update, accepted=False, reason="no-room")) is None
    assert outbox.acknowledge(Ack(one.update, accepted=True)) == one
    assert outbox.acknowledge(Ack(one.update, accepted=True)) is None


def test_updates_go_one_after_the_other_the_oldest_first(bench: Bench) -> None:
    put = [bench.device.put(update(number, b"")) for number in (10, 2, 9)]
    for number in (1, 2, 3):
        bench.await_manifests(number)
        bench.answer(bench.manifests[-1])
    assert [manifest.version for manifest in bench.manifests] == [2, 9, 10]
    bench.pump(10, lambda: not bench.device.waiting())
    assert len(put) == 3


def test_an_update_of_a_run_that_nobody_leads_waits_for_it(bench: Bench) -> None:
    other, one = bench.device.put(update(1, run="s")), bench.device.put(update(2))
    bench.await_manifests(1)
    bench.answer(one)
    bench.pump(SOON * 2)
    assert bench.manifests == [one]
    assert bench.device.waiting() == [other.update]
    bench.device.runs.add("s")
    bench.await_manifests(2)
    assert bench.manifests[-1] == other


def test_who_hears_that_the_aggregator_is_back_announces_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASK_AGAIN", 60.0)
    bench.device.put(update(1))
    bench.await_manifests(1)
    bench.pump(0.1)
    bench.device.outbox.hurry()
    bench.await_manifests(2)


def test_an_update_whose_file_is_damaged_is_not_sent_and_does_not_hold_up_the_next(bench: Bench) -> None:
    one, two = bench.device.put(update(1)), bench.device.put(update(2))
    file = bench.device.state.folder / "outbox" / f"{one.update}.update"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    bench.await_manifests(1)
    bench.ask(one, range(26))
    bench.await_manifests(2)
    assert bench.parts == []
    assert bench.device.waiting() == [two.update]


def test_an_update_comes_in_chunks_that_the_broker_takes_though_it_was_queued_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASK_AGAIN", SOON)
    data = bytes(range(256)) * 200
    with mosquitto(tmp_path, free_port(), "max_packet_size 20000") as broker:
        bench = Bench(tmp_path / "state", broker.address)
        queued = bench.device.put(update(1, data, chunk_size=65536), data)
        bench.await_manifests(1)
        (sent,) = bench.manifests
        assert queued.payload is not None
        assert sent.payload is not None
        assert (sent.update, sent.payload.sha256, sent.payload.size) == (queued.update, queued.payload.sha256, 51200)
        assert 10_000 < sent.payload.chunk_size < 20_000
        assert sent.payload.chunks == 3
        bench.ask(sent, [2, 1])
        assert bench.await_parts(2) == [1, 2]
        bench.ask(sent, [0])
        bench.await_parts(3)
        assert b"".join(part for _, _, part in sorted(bench.parts)) == data
        bench.close()
