"""The link against real brokers, good ones and wrong ones."""

from __future__ import annotations

import math
import secrets
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fleetune.edge.protocol import link as link_module
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerProtocolError, BrokerUnreachableError
from fleetune.edge.protocol.link import Connected, Disconnected, Event, Link, Received, Refused
from fleetune.edge.protocol.messages import Ack
from fleetune.edge.protocol.sending import Sending
from fleetune.server.broker import embedded_broker, free_port
from support.brokers import mosquitto
from support.mqtt5 import wait_until


def will() -> tuple[str, Ack]:
    return "t/will", Ack("gone", accepted=False)


@pytest.fixture
def broker() -> Iterator[BrokerAddress]:
    with embedded_broker(free_port()) as address:
        yield address


def connect(address: BrokerAddress, name: str, *topics: str) -> Link:
    link = Link(address, name, subscriptions=topics or ("t/nothing",), will=will)
    link.connect(timeout=5)
    return link


def collect(link: Link, kind: type[Event], count: int = 1, timeout: float = 10.0) -> list[Event]:
    found: list[Event] = []
    deadline = time.monotonic() + timeout
    while len(found) < count and time.monotonic() < deadline:
        found += [event for event in link.events(0.1) if isinstance(event, kind)]
    return found


def send(link: Link, messages: Iterable[tuple[str, bytes]], timeout: float = 10.0) -> Sending:
    sending = link.send(messages)
    deadline = time.monotonic() + timeout
    while not sending.done and not sending.lost and time.monotonic() < deadline:
        list(link.events(0.05))
    return sending


def test_what_is_published_arrives_in_order(broker: BrokerAddress) -> None:
    receiver, sender = connect(broker, "receiver", "t/#"), connect(broker, "sender")
    assert send(sender, ((f"t/{i}", bytes([i]) * 65536) for i in range(20))).done
    received = collect(receiver, Received, 20)
    assert [(e.topic, e.payload) for e in received] == [(f"t/{i}", bytes([i]) * 65536) for i in range(20)]
    assert receiver.bytes_in == sender.bytes_out == 20 * 65536
    receiver.close()
    sender.close()


def test_many_small_messages_that_come_at_once_are_all_heard_at_once(broker: BrokerAddress) -> None:
    receiver, sender = connect(broker, "receiver", "t/#"), connect(broker, "sender")
    for number in range(300):
        sender.publish(f"t/{number}", b"x")
    heard = collect(receiver, Received, 300, timeout=5)
    assert [event.topic for event in heard] == [f"t/{number}" for number in range(300)]  # type: ignore[union-attr]
    receiver.close()
    sender.close()


def test_a_retained_message_reaches_who_comes_later(broker: BrokerAddress) -> None:
    sender = connect(broker, "sender")
    sender.publish("t/state", b"here", retain=True)
    time.sleep(0.3)
    receiver = connect(broker, "receiver", "t/state")
    assert [event.payload for event in collect(receiver, Received)] == [b"here"]
    receiver.close()
    sender.close()


def test_nobody_at_the_address_is_said_with_a_remedy() -> None:
    link = Link(BrokerAddress("127.0.0.1", free_port()), "x", subscriptions=["t"], will=will)
    with pytest.raises(BrokerUnreachableError, match="no broker answers") as caught:
        link.connect(timeout=0.5)
    assert "fleetune broker" in caught.value.remedy


def test_a_broker_of_mqtt_3_only_is_named_as_such() -> None:
    from iotcore import Broker

    port = free_port()
    with Broker(port=port, listen="127.0.0.1"):  # its keyword arguments give a listener of MQTT 3.1.1
        link = Link(BrokerAddress("127.0.0.1", port), "x", subscriptions=["t"], will=will)
        with pytest.raises(BrokerProtocolError, match="MQTT 5") as caught:
            link.connect(timeout=5)
    assert "broker of MQTT 5" in caught.value.remedy


def test_the_link_restores_itself_and_its_subscriptions() -> None:
    port = free_port()
    with embedded_broker(port) as address:
        link = connect(address, "receiver", "t/#")
        collect(link, Connected)
    assert collect(link, Disconnected)
    with embedded_broker(port) as address:
        assert collect(link, Connected, timeout=15)
        sender = connect(address, "sender")
        sender.publish("t/again", b"hello")
        assert [event.payload for event in collect(link, Received)] == [b"hello"]
        sender.close()
        link.close()


def test_the_brokers_packet_limit_is_obeyed(tmp_path: Path) -> None:
    with mosquitto(tmp_path, free_port(), "max_packet_size 20000") as broker:
        link = connect(broker.address, "sender")
        with pytest.raises(BrokerProtocolError, match="maximum packet size of 20000"):
            link.publish("t", bytes(20001))
        assert send(link, [("t", bytes(link.max_chunk))]).done
        assert 10_000 < link.max_chunk < 20_000
        link.close()


def test_a_broker_that_takes_no_manifest_is_named_as_such(tmp_path: Path) -> None:
    with mosquitto(tmp_path, free_port(), "max_packet_size 2000") as broker:
        link = connect(broker.address, "sender")
        with pytest.raises(BrokerProtocolError, match="messages of 2000 bytes at most") as caught:
            collect(link, Connected)
        assert "max_packet_size" in caught.value.remedy
        link.close()


class Moody(threading.Thread):
    """Between clients and a broker: hangs up, without a word, on whoever sends a packet larger than it likes."""

    def __init__(self, broker: BrokerAddress, limit: int) -> None:
        super().__init__(daemon=True)
        self.hangups = 0
        self._broker, self._limit = broker, limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = BrokerAddress("127.0.0.1", self._listener.getsockname()[1])

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection((self._broker.host, self._broker.port))
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), client.makefile("rb") as stream:
            while first := stream.read(1):
                length, shift, head = 0, 0, bytearray(first)
                while True:  # the variable byte integer of every MQTT packet
                    head += stream.read(1)
                    length |= (head[-1] & 127) << shift
                    shift += 7
                    if head[-1] < 128:
                        break
                if length > self._limit:
                    self.hangups += 1
                    break
                server.sendall(head + stream.read(length))
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_a_broker_that_hangs_up_at_large_packets_gets_smaller_chunks(broker: BrokerAddress) -> None:
    moody = Moody(broker, 20_000)
    moody.start()
    link = connect(moody.address, "sender")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not send(link, [("t", bytes(link.max_chunk))], timeout=1).done:
        list(link.events(0.2))
    assert 8000 < link.max_chunk <= 20_000
    assert moody.hangups == 4  # two for each time that chunks were halved
    link.close()
    moody.close()


def test_one_who_does_not_listen_holds_no_more_than_a_bit_of_what_comes(broker: BrokerAddress) -> None:
    receiver, sender = connect(broker, "receiver", "t/#"), connect(broker, "sender")
    before = psutil.Process().memory_info().rss
    assert send(sender, ((f"t/{i}", bytes(65536)) for i in range(1200)), timeout=30).done
    time.sleep(1)
    assert receiver.bytes_in < 40 << 20
    assert psutil.Process().memory_info().rss - before < 120 << 20
    receiver.close()
    sender.close()


def test_a_topic_can_be_added_and_left_again(broker: BrokerAddress) -> None:
    receiver, sender = connect(broker, "receiver", "t/a"), connect(broker, "sender")
    collect(receiver, Connected)
    receiver.subscribe("t/b")
    time.sleep(0.3)
    assert send(sender, [("t/b", b"1"), ("t/a", b"2")]).done
    assert [e.payload for e in collect(receiver, Received, 2)] == [b"1", b"2"]
    receiver.unsubscribe("t/b")
    time.sleep(0.3)
    assert send(sender, [("t/b", b"3"), ("t/a", b"4")]).done
    assert [e.payload for e in collect(receiver, Received, 1)] == [b"4"]
    receiver.close()
    sender.close()


def test_why_there_is_no_broker_is_said_whenever_there_is_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "_SAY_WHY_AFTER", 1)
    port = free_port()
    link = Link(BrokerAddress("127.0.0.1", port), "x", subscriptions=["t"], will=will)
    waiting = threading.Thread(target=link.connect, args=[math.inf])
    waiting.start()
    assert wait_until(lambda: "waits for one" in caplog.text, 10)
    with embedded_broker(port):
        waiting.join(30)
        assert not waiting.is_alive()
    collect(link, Disconnected)

    def tries_again() -> bool:
        list(link.events(0.1))
        return "tries again" in caplog.text

    for _ in range(2):
        caplog.clear()
        assert wait_until(tries_again, 30)
        with embedded_broker(port):
            assert collect(link, Connected, timeout=30)
        collect(link, Disconnected)
    link.close()


def test_what_is_on_its_way_when_the_link_breaks_is_told_as_lost() -> None:
    port = free_port()
    with embedded_broker(port) as address:
        link = connect(address, "sender")
        collect(link, Connected)
        sending = link.send((f"t/{i}", bytes(65536)) for i in range(4000))
        assert not sending.done
    collect(link, Disconnected)
    assert sending.lost
    assert not sending.done
    link.close()


def test_a_message_that_the_broker_acknowledged_and_dropped_is_told(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read t/#\ntopic write t/mine\n")
    with mosquitto(tmp_path, free_port(), f"acl_file {tmp_path / 'acl'}") as broker:
        link = connect(broker.address, "sender")
        link.publish("t/mine", b"")
        link.publish("t/theirs", b"")  # acknowledged, and that is all that MQTT 3.1.1 knows
        assert collect(link, Refused) == [Refused("Not authorized")]
        link.close()


def test_the_last_words_arrive_before_the_link_is_closed(broker: BrokerAddress) -> None:
    link, later = connect(broker, "sender"), connect(broker, "later", "t/#")
    for number in range(300):
        link.publish("t/count", str(number).encode(), retain=True)
    link.close()
    assert [event.payload for event in collect(later, Received, 300)][-1] == b"299"
    later.close()


def test_two_of_one_name_do_not_take_the_connection_from_each_other(broker: BrokerAddress) -> None:
    links = connect(broker, "twin", "t/#"), connect(broker, "twin", "t/#")
    links[0].publish("t/hello", b"hello")
    assert [[event.payload for event in collect(link, Received)] for link in links] == [[b"hello"], [b"hello"]]
    for link in links:
        link.close()


def test_a_broker_that_ends_every_connection_is_given_up(
    broker: BrokerAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _bytes: "same")  # for one client id a broker keeps the newest
    links = connect(broker, "twin"), connect(broker, "twin")
    deadline = time.monotonic() + 30
    with pytest.raises(BrokerProtocolError, match="5 connections in a row") as caught:
        while time.monotonic() < deadline:
            for link in links:
                list(link.events(0.1))
    assert "broker's log" in caught.value.remedy
    for link in links:
        link.close()


class Rogue:
    """A broker that says something wrong to whoever connects first, and is a good one afterwards."""

    def __init__(self, wrong: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = BrokerAddress("127.0.0.1", self._listener.getsockname()[1])
        self._said = iter((wrong, _packet(0x32, b"\0\1t\0\7\0hello")))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=[connection], daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.recv(4096)
            connection.sendall(_packet(0x20, b"\0\0\0"))
            connection.sendall(_packet(0x90, connection.recv(4096)[2:4] + b"\0\1"))
            connection.sendall(next(self._said, b""))
            while connection.recv(4096):
                pass

    def close(self) -> None:
        self._listener.close()


def _packet(kind: int, body: bytes) -> bytes:
    return bytes([kind, len(body)]) + body


@pytest.mark.parametrize("wrong", [
    _packet(0x32, b"\0\4\xff\xfe\0\1\0\7\0hello") + b"\xf0\0",  # a topic that is no UTF-8, then no packet at all
    b"\x32\xff\xff\xff\x7f\0\1t\0\7\0hello",  # 256 MiB are to come
    b"\x32\xff\xff\xff\xff\x7f",
    _packet(0x32, b"\xff\xfft"),
    _packet(0x32, b"\0\1t\0\7\xff\xff\xff"),
    _packet(0x00, b"\0\0\0"),
    _packet(0x90, b"\0"),
], ids=["topic", "size", "length", "cut off", "properties", "kind", "answer"])  # fmt: skip
def test_a_broker_that_talks_nonsense_is_left_and_tried_again(wrong: bytes) -> None:
    rogue = Rogue(wrong)
    tracemalloc.start()
    link = connect(rogue.address, "me", "t")
    (received,) = collect(link, Received)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(received, Received)
    assert (received.topic, received.payload) == ("t", b"hello")
    assert peak < 4 << 20
    link.close()
    rogue.close()
