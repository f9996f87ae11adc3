"""A client of MQTT 5 that is told what to do, and does what a good one would not."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from support.brokers import Broker


class Peer:
    """One connection, which does not restore itself.

    Args:
        broker: Where to connect.
        client_id: Unique at the broker.
        will: Topic and payload of a retained Will.
        holds_acks: Acknowledge nothing before :meth:`receive` waits for it.
        clean_start: Forget an earlier session.
        context: Makes it a connection with TLS.
        properties: Of CONNECT, by paho's names.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
        holds_acks: bool = False,
        clean_start: bool = True,
        context: ssl.SSLContext | None = None,
        **properties: int,
    ) -> None:
        self.messages: list[mqtt.MQTTMessage] = []
        self.acks: dict[int, ReasonCode] = {}
        self.ends: list[ReasonCode] = []
        self.session_present = False
        self._connack: ReasonCode | None = None
        self._granted: list[int] = []
        self._holds_acks = holds_acks
        self._acknowledged = 0
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=holds_acks,
        )
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if context is not None:
            client.tls_set_context(context)
        if will is not None:
            client.will_set(*will, qos=1, retain=True)
        client.max_inflight_messages_set(8)
        client.on_connect = self._on_connect
        client.on_disconnect = lambda _c, _u, _f, reason, _p: self.ends.append(reason)
        client.on_message = lambda _c, _u, message: self.messages.append(message)
        client.on_publish = lambda _c, _u, mid, reason, _p: self.acks.update({mid: reason})
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = _no_delay
        self.client = client
        connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            setattr(connect, name, value)
        client.connect(broker.address.host, broker.address.port, 60, clean_start=clean_start, properties=connect)
        client.loop_start()
        assert wait_until(lambda: self._connack is not None or self.ends != []), "the broker does not answer"
        assert self._connack is not None, f"the broker refuses {client_id}: {self.ends}"
        assert not self._connack.is_failure, f"the broker refuses {client_id}: {self._connack}"

    def _on_connect(self, _c: Any, _u: Any, flags: mqtt.ConnectFlags, reason: ReasonCode, _p: Any) -> None:
        self.session_present, self._connack = flags.session_present, reason

    def _on_subscribe(self, _c: Any, _u: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        self._granted = [reason.value for reason in reasons]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def subscribe(self, *filters: str) -> Peer:
        """With QoS 1; returns when the broker has agreed."""
        self._granted = []
        self.client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in filters])
        assert wait_until(lambda: self._granted != []), f"no SUBACK for {filters}"
        assert self._granted == [1] * len(filters), f"the broker grants {filters} with {self._granted}"
        return self

    def send(self, topic: str, payload: bytes = b"", *, retain: bool = False, expiry: int | None = None) -> int:
        """Publish with QoS 1 and return at once; the number is a key of :attr:`acks`."""
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if expiry is not None:
            properties.MessageExpiryInterval = expiry
        return self.client.publish(topic, payload, 1, retain, properties).mid

    def publish(self, topic: str, payload: bytes = b"", *, retain: bool = False, expiry: int | None = None) -> None:
        """Publish with QoS 1 and wait for the acknowledgement."""
        mid = self.send(topic, payload, retain=retain, expiry=expiry)
        assert wait_until(lambda: mid in self.acks), (
            f"{topic} is not acknowledged; the connection ended with {self.ends}"
        )
        assert not self.acks[mid].is_failure, f"{topic}: {self.acks[mid]}"

    def receive(self, count: int, timeout: float = 10.0) -> list[mqtt.MQTTMessage]:
        """The first messages, once ``count`` have come or the time is over."""
        wait_until(lambda: self._arrived() >= count, timeout)
        return list(self.messages)

    def _arrived(self) -> int:
        if self._holds_acks:
            for message in self.messages[self._acknowledged :]:
                self.client.ack(message.mid, message.qos)
                self._acknowledged += 1
        return len(self.messages)

    def stall(self) -> None:
        """Neither read nor write any more; the connection stays."""
        self.client.loop_stop()

    def go_on(self) -> None:
        """End :meth:`stall`."""
        self.client.loop_start()

    def vanish(self) -> None:
        """Break the connection without a goodbye."""
        sock: Any = self.client.socket()
        sock.shutdown(socket.SHUT_RDWR)
        assert self.ended()

    def ended(self) -> bool:
        """Whether the connection ends in time."""
        return wait_until(lambda: self.ends != [])


def _no_delay(_c: mqtt.Client, _u: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def start_victim(broker: Broker, topic: str, *, keepalive: int = 60) -> subprocess.Popen[str]:
    """A connected process with a Will on ``topic``, to be killed; it disconnects when its standard input closes."""
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                str(Path(__file__).with_name("victim.py")),
                broker.address.host,
                str(broker.address.port),
            ),
            *(topic, str(keepalive), broker.username or "", broker.password or ""),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n"
    return process
