"""What Fleetune relies on, held against every broker that is here: see docs/brokers.md."""

from __future__ import annotations

import selectors
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.edge.protocol.link import Connected, Disconnected, Event, Link, Received
from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import free_port
from support.brokers import BROKERS, Broker
from support.mqtt5 import Peer, start_victim, wait_until


def name() -> str:
    return f"peer-{uuid.uuid4().hex}"


def chunk(index: int, size: int = MAX_CHUNK) -> bytes:
    return index.to_bytes(4, "big") * (size // 4)


class TestDelivery:
    def test_chunks_arrive_whole_and_in_order(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name()) as receiver:
            receiver.subscribe(topics.broadcast_chunk("+", "+", "+"))
            for i in range(100):
                sender.send(topics.broadcast_chunk("job", 1, i), chunk(i))
            received = receiver.receive(100)
            assert [m.topic for m in received] == [topics.broadcast_chunk("job", 1, i) for i in range(100)]
            assert all(m.payload == chunk(i) for i, m in enumerate(received))
            assert wait_until(lambda: len(sender.acks) == 100)

    def test_a_packet_of_almost_128_kib_passes(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name()) as receiver:
            receiver.subscribe(topics.down("cam", "+"))
            sender.publish(topics.down("cam", "large"), chunk(7, 127 * 1024))
            assert [m.payload for m in receiver.receive(1)] == [chunk(7, 127 * 1024)]

    def test_what_is_too_large_is_not_swallowed(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as peer:
            peer.subscribe(topics.down("cam", "+"))
            mid = peer.send(topics.down("cam", "huge"), bytes(1 << 20))
            assert wait_until(lambda: mid in peer.acks or bool(peer.ends))
            refused = bool(peer.ends) or peer.acks[mid].is_failure
            assert refused or [len(m.payload) for m in peer.receive(1)] == [1 << 20]

    def test_a_message_that_is_too_large_for_a_client_leaves_it_connected(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name(), MaximumPacketSize=1000) as receiver:
            receiver.subscribe(topics.down("cam", "+"))
            sender.publish(topics.down("cam", "large"), bytes(2000))
            sender.publish(topics.down("cam", "small"), b"small")
            assert wait_until(lambda: receiver.messages[-1:] != [] and receiver.messages[-1].payload == b"small")
            assert receiver.ends == []

    def test_a_plus_is_one_level(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name()) as receiver:
            receiver.subscribe(topics.upload_chunk("+", "+", "+"))
            for topic in (
                topics.up("cam", "need"),
                topics.down("cam", "ack"),
                topics.upload_chunk("cam", "u", "0") + "/more",
                topics.upload_chunk("cam", "u", 0),
                topics.upload_manifest("cam-2", "v"),
            ):
                sender.publish(topic, b"x")
            receiver.receive(2)
            time.sleep(0.2)
            assert {m.topic for m in receiver.messages} == {
                topics.upload_chunk("cam", "u", 0),
                topics.upload_manifest("cam-2", "v"),
            }

    def test_what_nobody_reads_is_acknowledged(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender:
            sender.publish(topics.down("nobody", "ack"), b"x")

    def test_a_client_that_acknowledges_slowly_gets_all_in_order(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name(), holds_acks=True, ReceiveMaximum=10) as receiver:
            receiver.subscribe(topics.upload_chunk("+", "+", "+"))
            for i in range(250):  # more than any broker lets wait for an acknowledgement
                sender.send(topics.upload_chunk("cam", "u", i), b"x")
            expected = [topics.upload_chunk("cam", "u", i) for i in range(250)]
            assert [m.topic for m in receiver.receive(250)] == expected

    def test_one_that_stalls_neither_holds_up_the_others_nor_loses_anything(
        self, broker: Broker, topics: Topics
    ) -> None:
        count = 256  # 16 MiB: more than all sockets on the way take
        with Peer(broker, name()) as sender, Peer(broker, name()) as stalled, Peer(broker, name()) as receiver:
            for peer in (stalled, receiver):
                peer.subscribe(topics.broadcast_chunk("+", "+", "+"))
            stalled.stall()
            for i in range(count):
                sender.send(topics.broadcast_chunk("job", 1, i), chunk(i), expiry=600)
            assert len(receiver.receive(count)) == count
            assert stalled.messages == []
            stalled.go_on()
            assert [m.payload for m in stalled.receive(count)] == [chunk(i) for i in range(count)]


class TestRetained:
    def test_the_newest_is_kept_and_marked(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender, Peer(broker, name()) as early:
            early.subscribe(topics.presence("+"))
            sender.publish(topics.presence("cam"), b"old", retain=True)
            sender.publish(topics.presence("cam"), b"new", retain=True)
            assert [(m.payload, m.retain) for m in early.receive(2)] == [(b"old", False), (b"new", False)]
            with Peer(broker, name()) as late:
                late.subscribe(topics.presence("+"))
                late.receive(1)
                time.sleep(0.1)
                assert [(m.payload, m.retain) for m in late.messages] == [(b"new", True)]
            sender.publish(topics.presence("cam"), b"", retain=True)

    def test_an_empty_one_clears_it(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender:
            sender.publish(topics.current("job"), b"kept", retain=True)
            sender.publish(topics.current("job"), b"", retain=True)
            with Peer(broker, name()) as late:
                late.subscribe(topics.current("+"))
                time.sleep(0.2)
                assert late.messages == []

    def test_it_lives_as_long_as_it_says(self, broker: Broker, topics: Topics) -> None:
        with Peer(broker, name()) as sender:
            sender.publish(topics.current("short"), b"x", retain=True, expiry=1)
            sender.publish(topics.current("long"), b"x", retain=True, expiry=100)
            time.sleep(2.1)
            with Peer(broker, name()) as late:
                late.subscribe(topics.current("+"))
                late.receive(1)
                time.sleep(0.1)
                assert [m.topic for m in late.messages] == [topics.current("long")]
                assert 96 <= getattr(late.messages[0].properties, "MessageExpiryInterval", 0) <= 98
            sender.publish(topics.current("long"), b"", retain=True)


class TestPresence:
    @pytest.fixture
    def watch(self, broker: Broker, topics: Topics) -> Iterator[Peer]:
        with Peer(broker, name()) as watch:
            yield watch.subscribe(topics.presence("+"))
            watch.publish(topics.presence("cam"), b"", retain=True)

    def test_who_is_killed_leaves_its_will(self, broker: Broker, topics: Topics, watch: Peer) -> None:
        victim = start_victim(broker, topics.presence("cam"))
        victim.kill()
        assert [m.payload for m in watch.receive(1, timeout=2)] == [b"gone"]
        victim.wait()
        with Peer(broker, name()) as late:
            late.subscribe(topics.presence("+"))
            assert [(m.payload, m.retain) for m in late.receive(1)] == [(b"gone", True)]

    def test_who_falls_silent_leaves_its_will(self, broker: Broker, topics: Topics, watch: Peer) -> None:
        victim = start_victim(broker, topics.presence("cam"), keepalive=1)
        victim.send_signal(signal.SIGSTOP)
        try:
            assert [m.payload for m in watch.receive(1)] == [b"gone"]
        finally:
            victim.kill()
            victim.wait()

    def test_who_says_goodbye_leaves_none(self, broker: Broker, topics: Topics, watch: Peer) -> None:
        victim = start_victim(broker, topics.presence("cam"))
        victim.communicate()
        time.sleep(0.3)
        assert watch.messages == []

    def test_the_newest_client_of_a_name_is_the_one(self, broker: Broker, topics: Topics, watch: Peer) -> None:
        client_id, topic = name(), topics.presence("cam")
        for boot in range(5):
            first = Peer(broker, client_id, will=(topic, b"gone"))
            with Peer(broker, client_id, will=(topic, b"gone")) as second:
                online = f"online {boot}".encode()
                second.publish(topic, online, retain=True)
                assert first.ended()
                watch.receive(2 * (boot + 1))
                time.sleep(0.1)
                # A Will of the old one that comes after what the new one says makes the fleet take it for gone.
                late = watch.messages[-1].payload != online
                if late and broker.name == "ejabberd":
                    pytest.xfail("its Wills come late: see docs/brokers.md")
                assert not late
                assert second.ends == []
                second.subscribe(topics.down("cam", "+"))
                watch.publish(topics.down("cam", "ack"), b"x")
                assert [m.payload for m in second.receive(1)] == [b"x"]

    def test_a_session_ends_with_its_connection(self, broker: Broker, topics: Topics, watch: Peer) -> None:
        client_id = name()
        Peer(broker, client_id).subscribe(topics.down("cam", "+")).vanish()
        watch.publish(topics.down("cam", "ack"), b"while away")
        with Peer(broker, client_id, clean_start=False) as again:
            watch.publish(topics.down("cam", "ack"), b"not subscribed")
            again.subscribe(topics.down("cam", "+"))
            watch.publish(topics.down("cam", "ack"), b"now")
            again.receive(1)
            time.sleep(0.1)
            assert (again.session_present, [m.payload for m in again.messages]) == (False, [b"now"])


class TestFleet:
    def test_a_fleet_that_comes_at_once_gets_in(self, broker: Broker) -> None:
        count = 300
        answers = _connect_at_once(broker, count, timeout=20)
        assert answers == [b"\x20\0"] * count

    def test_the_link_survives_the_brokers_death(self, broker: Broker, topics: Topics, tmp_path: Path) -> None:
        if not broker.processes:
            pytest.skip("only its owner may stop it")
        if broker.username is not None:
            pytest.skip("the link knows no passwords yet")
        port = free_port()
        with BROKERS[broker.name](tmp_path, port) as first:
            link = Link(first.address, name(), subscriptions=[topics.down("cam", "+")])
            link.connect()
            assert _collect(link, Connected, timeout=5)
            first.kill()
            assert _collect(link, Disconnected, timeout=5)
        try:
            with BROKERS[broker.name](tmp_path, port) as second, Peer(second, name()) as sender:
                assert _collect(link, Connected, timeout=15)
                sender.publish(topics.down("cam", "ack"), chunk(1))
                assert _collect(link, Received, timeout=5) == [Received(topics.down("cam", "ack"), chunk(1))]
        finally:
            link.close()


def _collect(link: Link, kind: type[Event], timeout: float) -> list[Event]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := [event for event in link.events(0.1) if isinstance(event, kind)]:
            return found
    return []


def _connect_at_once(broker: Broker, count: int, timeout: float) -> list[bytes]:
    """Type and reason of the answers to as many CONNECT packets, sent before the first answer is read."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(2, "big") + value.encode()

    flags, secrets = (0xC2, text(broker.username) + text(broker.password or "")) if broker.username else (0x02, b"")
    selector, answers, deadline = selectors.DefaultSelector(), [], time.monotonic() + timeout
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((broker.address.host, broker.address.port))
        selector.register(sock, selectors.EVENT_WRITE)
    while selector.get_map() and time.monotonic() < deadline:
        for key, events in selector.select(0.1):
            answering = key.fileobj
            assert isinstance(answering, socket.socket)
            if events & selectors.EVENT_WRITE:
                body = text("MQTT") + bytes([5, flags, 0, 60, 0]) + text(name()) + secrets
                answering.send(bytes([0x10, len(body)]) + body)
                selector.modify(answering, selectors.EVENT_READ)
            else:
                answer = answering.recv(256)
                answers.append(answer[:1] + answer[3:4])
                selector.unregister(answering)
                answering.close()
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    return answers
