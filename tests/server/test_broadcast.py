"""What goes down, over a real broker: once for all devices, and once more for those that ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.link import Connected, Disconnected, Event, Link, Received
from fleetune.edge.protocol.messages import Announcement, Need, Payload, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.server import broadcast as module
from fleetune.server.broadcast import Broadcast
from fleetune.server.broker import embedded_broker, free_port
from support.brokers import mosquitto

TOPICS = Topics("lab")
GATHER = 0.2
"""Seconds in which needs are gathered, in these tests."""

CHANGES = bytes(range(256)) * 8
WHOLE = CHANGES[::-1] * 2
DAY = 24 * 3600


def described(data: bytes, chunk_size: int = 100) -> Payload:
    return chunks.describe(data, "f32", chunk_size)


def announcement(changes: Payload | None, whole: Payload | None = None, version: int = 1) -> Announcement:
    return Announcement(
        fleet="lab", run="r", job="fedms", version=version, method="fedms", stage="global", round=1, rounds=6,
        backbone="b", quantisation="nf4", settings={}, issued=0.0, expires=0.0, whole=whole, changes=changes,
    )  # fmt: skip


ROUND = announcement(described(CHANGES), described(WHOLE))
DATA = {described(data).sha256: data for data in (CHANGES, WHOLE)}


class Device:
    """Hears all that goes down, and asks for what it is told to."""

    def __init__(self, broker: BrokerAddress, name: str) -> None:
        self.name = name
        self.announced: list[Announcement] = []
        self.parts: list[tuple[str, int, bytes]] = []
        self.repairs: list[tuple[str, int, bytes]] = []
        self.order: list[str] = []
        self.bytes = 0
        topics = TOPICS.current("+"), TOPICS.broadcast_chunk("+", "+", "+"), TOPICS.repair_chunk("+", "+", "+")
        self.link = Link(broker, name, subscriptions=topics)
        self.link.connect()

    def pump(self) -> None:
        for event in self.link.events(0.005):
            if not isinstance(event, Received):
                continue
            self.bytes += len(event.payload)
            match TOPICS.split(event.topic):
                case ("g", _, "current"):
                    self.announced.append(open_envelope(event.payload, Announcement))
                case ("g", _, sha256, index):
                    self.parts.append((sha256, int(index), event.payload))
                    self.order.append("part")
                case ("g", _, sha256, "r", index):
                    self.repairs.append((sha256, int(index), event.payload))
                    self.order.append("repair")

    def need(self, indices: Iterable[int], payload: Payload | None = None, *, job: str = "fedms") -> None:
        payload = payload or ROUND.changes
        assert payload is not None
        bitmap = chunks.pack_bitmap(indices, 64)
        self.link.publish(TOPICS.up(self.name, "need"), seal(Need(job, payload.sha256, bitmap)))

    def repaired(self) -> list[int]:
        return [index for _, index, _ in self.repairs]


class Bench:
    """The part of an aggregator that sends, and its devices."""

    def __init__(self, broker: BrokerAddress) -> None:
        self._broker = broker
        self.devices: list[Device] = []
        self.needs = 0
        self.link = Link(broker, "aggregator", subscriptions=[TOPICS.up("+", "need")])
        self.link.connect()
        self.broadcast = Broadcast(self.link, TOPICS)

    def device(self) -> Device:
        self.devices.append(Device(self._broker, f"d{len(self.devices)}"))
        return self.devices[-1]

    def pump(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let all go on, for so long or until something is so."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            for event in self.link.events(0.005):
                if isinstance(event, Received):
                    self.needs += 1
                    self.broadcast.need(open_envelope(event.payload, Need))
            self.broadcast.repair()
            for device in self.devices:
                device.pump()

    def await_event(self, kind: type[Event]) -> None:
        end = time.monotonic() + 10
        while not any(isinstance(event, kind) for event in self.link.events(0.1)):
            assert time.monotonic() < end, f"no {kind.__name__}"

    def hear(self, wanted: Callable[[], bool]) -> None:
        """Wait until something has come, and for a moment longer: there may be more than was wanted."""
        self.pump(10, wanted)
        self.pump(GATHER + 0.1)

    def close(self) -> None:
        for device in self.devices:
            device.link.close()
        self.link.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(module, "_GATHER", GATHER)
    with embedded_broker(free_port()) as broker:
        bench = Bench(broker)
        yield bench
        bench.close()


# --- an announcement --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listeners", [1, 5])
def test_a_fresh_announcement_goes_with_its_changes_once_for_all(listeners: int, bench: Bench) -> None:
    devices = [bench.device() for _ in range(listeners)]
    bench.broadcast.announce(ROUND, DATA, fresh=True)
    bench.hear(lambda: all(len(device.parts) >= 21 for device in devices))
    for device in devices:
        (announced,) = device.announced
        assert (announced.version, announced.whole, announced.changes) == (1, ROUND.whole, ROUND.changes)
        assert ROUND.changes is not None
        assert [(sha256, index) for sha256, index, _ in device.parts] == [(ROUND.changes.sha256, i) for i in range(21)]
        assert b"".join(part for _, _, part in device.parts) == CHANGES
        assert device.repairs == []
        assert bench.link.bytes_out == device.bytes


@pytest.mark.parametrize(("announced", "fresh"), [(ROUND, False), (announcement(None, described(WHOLE)), True)])
def test_what_was_sent_before_and_what_did_not_change_is_not_sent(
    announced: Announcement, fresh: bool, bench: Bench
) -> None:
    device = bench.device()
    bench.broadcast.announce(announced, DATA, fresh=fresh)
    bench.hear(lambda: device.announced != [])
    assert len(device.announced) == 1
    assert (device.parts, device.repairs) == ([], [])


def test_who_comes_later_hears_the_newest_announcement_which_counts_for_a_day_from_then(bench: Bench) -> None:
    first = bench.device()
    bench.broadcast.announce(ROUND, DATA, fresh=True)
    bench.hear(lambda: len(first.parts) >= 21)
    again = time.time()
    bench.broadcast.announce(ROUND, DATA, fresh=False)
    bench.pump(10, lambda: len(first.announced) == 2)
    later = bench.device()
    bench.hear(lambda: later.announced != [])
    assert [a.version for a in first.announced + later.announced] == [1, 1, 1]
    assert first.announced[0].expires < again + DAY <= first.announced[1].expires <= time.time() + DAY
    assert later.announced == first.announced[1:]
    assert later.parts == []


# --- what devices lack ------------------------------------------------------------------------------------------


def test_what_several_devices_lack_is_sent_once_for_all(bench: Bench) -> None:
    one, two = bench.device(), bench.device()
    bench.broadcast.announce(ROUND, DATA, fresh=False)
    one.need([0, 3])
    two.need([3, 20])
    bench.pump(10, lambda: bench.needs == 2)
    bench.hear(lambda: len(one.repairs) >= 3)
    assert ROUND.changes is not None
    for device in (one, two):
        assert device.repairs == [
            (ROUND.changes.sha256, 0, CHANGES[:100]),
            (ROUND.changes.sha256, 3, CHANGES[300:400]),
            (ROUND.changes.sha256, 20, CHANGES[2000:]),
        ]
        assert device.parts == []
    two.need([3])
    bench.hear(lambda: len(two.repairs) >= 4)
    assert two.repaired() == [0, 3, 20, 3]


def test_who_has_not_what_the_changes_are_added_to_gets_the_whole(bench: Bench) -> None:
    one, two = bench.device(), bench.device()
    bench.broadcast.announce(ROUND, DATA, fresh=False)
    one.need([1])
    two.need(range(41), ROUND.whole)
    bench.hear(lambda: len(one.repairs) >= 42)
    assert ROUND.changes is not None
    assert ROUND.whole is not None
    assert [(s, i) for s, i, _ in one.repairs if s == ROUND.changes.sha256] == [(ROUND.changes.sha256, 1)]
    assert b"".join(part for sha256, _, part in one.repairs if sha256 == ROUND.whole.sha256) == WHOLE
    assert len(one.repairs) == 42


def test_what_was_not_announced_is_not_sent(bench: Bench) -> None:
    device = bench.device()
    old = b"the round before"
    before = announcement(described(old), version=0)
    bench.broadcast.announce(before, {described(old).sha256: old}, fresh=False)
    device.need([0], before.changes)
    bench.pump(10, lambda: bench.needs == 1)
    bench.broadcast.announce(ROUND, {**DATA, described(old).sha256: old}, fresh=False)
    device.need([0], before.changes)
    device.need([0], described(b"unheard of"))
    device.need([0], job="another")
    device.need([21, 22, 63])
    bench.pump(10, lambda: bench.needs == 5)
    bench.pump(GATHER + 0.2)
    assert device.repairs == []
    device.need([20, 21])
    bench.hear(lambda: device.repairs != [])
    assert device.repaired() == [20]


def test_what_is_asked_for_while_more_is_on_its_way_waits_and_is_sent_once(bench: Bench) -> None:
    device = bench.device()
    bench.broadcast.announce(ROUND, DATA, fresh=True)
    for indices in ([2], [2, 5]):  # nothing is acknowledged meanwhile, so the rest of the changes waits
        assert ROUND.changes is not None
        bench.broadcast.need(Need("fedms", ROUND.changes.sha256, chunks.pack_bitmap(indices, 21)))
        time.sleep(GATHER + 0.05)
        bench.broadcast.repair()
    bench.hear(lambda: len(device.parts) >= 21 and len(device.repairs) >= 2)
    assert device.repaired() == [2, 5]
    assert device.order == ["part"] * 21 + ["repair"] * 2


def test_a_sending_that_was_lost_with_the_link_does_not_hold_up_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GATHER", GATHER)
    port = free_port()
    with ExitStack() as stack:
        with embedded_broker(port) as broker:
            bench = Bench(broker)
            stack.callback(bench.close)
            bench.await_event(Connected)
            bench.broadcast.announce(ROUND, DATA, fresh=True)  # as many chunks as go without an acknowledgement
        bench.await_event(Disconnected)
        stack.enter_context(embedded_broker(port))
        bench.await_event(Connected)
        device = bench.device()
        bench.broadcast.announce(ROUND, DATA, fresh=False)
        device.need(range(21))
        bench.hear(lambda: len(device.repairs) >= 21)
        assert b"".join(part for _, _, part in device.repairs) == CHANGES
        assert device.parts == []


# --- the broker's limits ----------------------------------------------------------------------------------------


def test_chunks_are_no_larger_than_the_broker_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GATHER", GATHER)
    changes, whole = bytes(range(256)) * 200, bytes(reversed(range(256))) * 300
    announced = announcement(described(changes, 65536), described(whole, 65536))
    data = {described(some).sha256: some for some in (changes, whole)}
    with mosquitto(tmp_path, free_port(), "max_packet_size 20000") as broker, ExitStack() as stack:
        bench = Bench(broker.address)
        stack.callback(bench.close)
        device = bench.device()
        bench.broadcast.announce(announced, data, fresh=True)
        bench.hear(lambda: len(device.parts) >= 3)
        (heard,) = device.announced
        for sent, planned in ((heard.changes, announced.changes), (heard.whole, announced.whole)):
            assert sent is not None
            assert planned is not None
            assert (sent.sha256, sent.size) == (planned.sha256, planned.size)
            assert 10_000 < sent.chunk_size < 20_000
        assert heard.whole is not None
        assert b"".join(part for _, _, part in device.parts) == changes
        device.need(range(heard.whole.chunks), heard.whole)
        bench.hear(lambda: len(device.repairs) >= 4)
        assert b"".join(part for _, _, part in device.repairs) == whole
        assert {len(part) for _, _, part in device.parts[:-1] + device.repairs[:-1]} == {heard.whole.chunk_size}


# --- the end ----------------------------------------------------------------------------------------------------


def test_what_belongs_to_a_job_that_is_over_cannot_be_asked_for(bench: Bench) -> None:
    device = bench.device()
    bench.broadcast.announce(ROUND, DATA, fresh=False)
    device.need([1])
    bench.pump(10, lambda: bench.needs == 1)  # and the job ends before it is answered
    bench.broadcast.end(announcement(None, version=2))
    device.need([2])
    bench.pump(10, lambda: bench.needs == 2)
    bench.pump(GATHER + 0.2)
    assert device.repairs == []
    later = bench.device()
    bench.pump(10, lambda: later.announced != [])
    (last,) = later.announced
    assert (last.version, last.whole, last.changes) == (2, None, None)
    assert time.time() + DAY - 60 < last.expires <= time.time() + DAY
