"""The way to the broker and back, on real brokers: good ones, and each of the wrong ones."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.link import Link
from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.doctor import broker
from fleetune.tools.doctor.broker import RoundTrip, check_broker
from fleetune.tools.doctor.host import Check
from support import brokers

pytest.importorskip("iotcore", reason="needs iotcore: pip install 'fleetune[server]'")

TOPIC = "ft/1/lab/up/cam-01/echo"
Mosquitto = Callable[..., BrokerAddress]


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """Starts Mosquitto with limits, and an ACL if there are rules for one."""
    with ExitStack() as stack:

        def start(*limits: str, acl: str = "") -> BrokerAddress:
            if acl:
                (tmp_path / "acl").write_text(acl)
                limits = (*limits, f"acl_file {tmp_path / 'acl'}")
            return stack.enter_context(brokers.mosquitto(tmp_path, free_port(), *limits)).address

        yield start


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is far away."""
    monkeypatch.setattr(broker, "_BACK_S", 2.0)
    monkeypatch.setattr(broker, "_ANSWER_S", 2.0)
    monkeypatch.setattr(broker, "_CONNECT_S", 1.0)


def trip(address: BrokerAddress) -> RoundTrip:
    return RoundTrip(address, "lab", "cam-01")


def test_the_embedded_broker_brings_a_chunk_back() -> None:
    with embedded_broker(free_port()) as address:
        found = check_broker(trip(address))
    assert (found.verdict, found.code) == ("note", 0), found.found
    assert "any device may speak for every other" in found.found
    assert f"{MAX_CHUNK} after" in found.found


def test_so_does_mosquitto_which_lets_the_device_use_its_topics_alone(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto(acl="topic write ft/1/lab/up/cam-01/#\ntopic read ft/1/lab/up/cam-01/echo\n")))
    assert found.verdict == "ok", found.found
    assert "refuses what is sent in other names" in found.found


def test_a_broker_that_does_not_say_is_not_said_to_give_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rights = broker._check_rights
    with brokers.mosquitto(tmp_path, free_port(), "max_connections 9") as running:

        def later(*arguments: Any) -> Check:
            running.processes[0].suspend()
            return rights(*arguments)

        monkeypatch.setattr(broker, "_check_rights", later)
        try:
            found = check_broker(trip(running.address))
        finally:
            running.processes[0].resume()
    assert (found.verdict, found.code) == ("failure", broker.UNREACHABLE)
    assert "has not said in 2 s" in found.found


def test_an_agent_of_the_same_id_keeps_its_connection(mosquitto: Mosquitto) -> None:
    address = mosquitto()
    agent = Link(address, "lab-cam-01", subscriptions=["ft/1/lab/dn/cam-01/+"])
    agent.connect()
    assert check_broker(trip(address)).verdict == "note"
    kinds = {type(event).__name__ for _ in range(5) for event in agent.events(0.1)}
    agent.close()
    assert kinds == {"Connected"}


def test_nothing_stays_at_the_broker(mosquitto: Mosquitto) -> None:
    address = mosquitto()
    check_broker(trip(address))
    later = Link(address, "later", subscriptions=["#"])
    later.connect()
    kinds = [type(event).__name__ for _ in range(5) for event in later.events(0.1)]
    later.close()
    assert kinds == ["Connected"]


def test_nobody_at_the_address() -> None:
    found = check_broker(trip(BrokerAddress("127.0.0.1", free_port())))
    assert (found.verdict, found.code) == ("failure", broker.UNREACHABLE)
    assert "no broker answers" in found.found
    assert found.fix


def test_somebody_who_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = check_broker(trip(BrokerAddress("127.0.0.1", server.getsockname()[1])))
    assert found.code == broker.UNREACHABLE
    assert "does not answer" in found.found


def test_a_broker_of_mqtt_3_only() -> None:
    from iotcore import Broker

    port = free_port()
    with Broker(port=port, listen="127.0.0.1"):
        found = check_broker(trip(BrokerAddress("127.0.0.1", port)))
    assert found.code == broker.NOT_MQTT_5
    assert "MQTT 5" in found.found


def test_a_denied_publish_is_told_with_the_brokers_reason(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto(acl="topic read ft/1/lab/#\n")))
    assert (found.verdict, found.code) == ("failure", broker.PUBLISH_DENIED)
    assert f"{TOPIC}: Not authorized" in found.found
    assert f"topic write {TOPIC}" in found.fix


def test_a_broker_that_hangs_up_at_the_first_message(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto("message_size_limit 10")))
    assert (found.verdict, found.code) == ("failure", broker.PUBLISH_DENIED)
    assert f"{TOPIC}: it hung up" in found.found


def test_a_denied_subscription_is_granted_and_yet_nothing_comes_back(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto(acl="topic write ft/1/lab/#\n")))
    assert (found.verdict, found.code) == ("failure", broker.NOTHING_BACK)
    assert "nothing came back within 2 s" in found.found
    assert f"topic read {TOPIC}" in found.fix


def test_a_limit_of_the_packet_size_that_is_announced(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto("max_packet_size 20000")))
    assert (found.verdict, found.code) == ("failure", broker.PACKET_TOO_SMALL)
    assert "maximum packet size of 20000" in found.found
    assert "max_packet_size" in found.fix


def test_a_limit_of_the_message_size_that_nobody_announces(mosquitto: Mosquitto) -> None:
    found = check_broker(trip(mosquitto("message_size_limit 20000")))
    assert found.code == broker.PACKET_TOO_SMALL
    assert f"one of {MAX_CHUNK} made the broker hang up" in found.found
    assert "message_size_limit" in found.fix


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (("http://broker", "lab", "cam-01"), "broker"),
        (("mqtt://broker", "la/b", "cam-01"), "--fleet"),
        (("mqtt://broker", "lab", "#"), "--id"),
    ],
)
def test_what_is_no_address_and_no_name_is_refused(parts: tuple[str, str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RoundTrip.parse(*parts)
