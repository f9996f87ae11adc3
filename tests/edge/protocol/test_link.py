"""The link against real brokers, good ones and wrong ones."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest

from fleetune.edge.protocol.errors import BrokerProtocolError, BrokerUnreachableError
from fleetune.edge.protocol.link import BrokerAddress, Connected, Disconnected, Event, Link, Received, Refused
from fleetune.server.broker import embedded_broker, free_port

WILL = ("t/will", b"gone")


@pytest.fixture
def broker() -> Iterator[BrokerAddress]:
    with embedded_broker(free_port()) as address:
        yield address


def connect(address: BrokerAddress, name: str, *topics: str) -> Link:
    link = Link(address, name, subscriptions=topics or ("t/nothing",), will=WILL)
    link.connect(timeout=5)
    return link


def collect(link: Link, kind: type[Event], count: int = 1, timeout: float = 10.0) -> list[Event]:
    found: list[Event] = []
    deadline = time.monotonic() + timeout
    while len(found) < count and time.monotonic() < deadline:
        found += [event for event in link.events(0.1) if isinstance(event, kind)]
    return found


def test_what_is_published_arrives_in_order(broker: BrokerAddress) -> None:
    receiver, sender = connect(broker, "receiver", "t/#"), connect(broker, "sender")
    sender.publish_many((f"t/{i}", bytes([i]) * 65536) for i in range(20))
    received = collect(receiver, Received, 20)
    assert [(e.topic, e.payload) for e in received] == [(f"t/{i}", bytes([i]) * 65536) for i in range(20)]
    assert receiver.bytes_in == sender.bytes_out == 20 * 65536
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
    link = Link(BrokerAddress("127.0.0.1", free_port()), "x", subscriptions=["t"], will=WILL)
    with pytest.raises(BrokerUnreachableError, match="no broker answers") as caught:
        link.connect(timeout=0.5)
    assert "fleetune broker" in caught.value.remedy


def test_a_broker_of_mqtt_3_only_is_named_as_such() -> None:
    from iotcore import Broker

    port = free_port()
    with Broker(port=port, listen="127.0.0.1"):  # its keyword arguments give a listener of MQTT 3.1.1
        link = Link(BrokerAddress("127.0.0.1", port), "x", subscriptions=["t"], will=WILL)
        with pytest.raises(BrokerProtocolError, match="MQTT 5") as caught:
            link.connect(timeout=5)
    assert "speaks MQTT 5" in caught.value.remedy


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


@contextmanager
def mosquitto(folder: Path, *lines: str) -> Iterator[BrokerAddress]:
    program = which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("Mosquitto is not installed (apt-get install mosquitto)")
    port = free_port()
    config = folder / "mosquitto.conf"
    own = (f"listener {port} 127.0.0.1", "allow_anonymous true", "user root")  # who may read pytest's folders
    config.write_text("\n".join([*own, *lines]) + "\n")
    process = subprocess.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield BrokerAddress("127.0.0.1", port)
    finally:
        process.terminate()
        process.wait()


def test_the_brokers_packet_limit_is_obeyed(tmp_path: Path) -> None:
    with mosquitto(tmp_path, "max_packet_size 2000") as address:
        link = connect(address, "sender")
        with pytest.raises(BrokerProtocolError, match="maximum packet size of 2000"):
            link.publish("t", bytes(4000))
        link.publish_many([("t", bytes(1000))], timeout=5)
        link.close()


def test_a_message_that_the_broker_acknowledged_and_dropped_is_told(tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read t/#\ntopic write t/mine\n")
    with mosquitto(tmp_path, f"acl_file {tmp_path / 'acl'}") as address:
        link = connect(address, "sender")
        link.publish("t/mine", b"")
        assert link.publish_many([("t/theirs", b"")], timeout=5)  # acknowledged, and that is all that MQTT 3.1.1 knows
        assert collect(link, Refused) == [Refused("Not authorized")]
        link.close()


def test_two_clients_of_one_name_do_not_fight_for_ever(broker: BrokerAddress) -> None:
    links = connect(broker, "twin"), connect(broker, "twin")
    deadline = time.monotonic() + 30
    with pytest.raises(BrokerProtocolError, match="5 connections in a row") as caught:
        while time.monotonic() < deadline:
            for link in links:
                list(link.events(0.1))
    assert "nothing else connects as 'twin'" in caught.value.remedy
    for link in links:
        link.close()
