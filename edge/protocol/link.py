"""The MQTT 5 connection, for devices and the aggregator alike.

paho-mqtt runs the network in a thread of its own; its callbacks only put events on a queue, and everything else
happens in the thread that calls :meth:`Link.events`.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleetune.edge.protocol.errors import BrokerProtocolError, BrokerUnreachableError, ConfigError, install_hint
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_MESSAGE

log = logging.getLogger(__name__)

_PACKET_OVERHEAD = 4096
_MAX_PACKET = max(MAX_CHUNK, MAX_MESSAGE) + _PACKET_OVERHEAD
_SHORT_LIFE = 5.0
"""Seconds; a connection that breaks sooner after it was made is one that the broker ended."""

_SHORT_LIVES = 5
"""So many of them in a row are no accident."""

_KEEP_ALIVE = 15
"""Seconds between signs of life; after half as many more a broker says that this side is gone."""

_ANSWER_WITHIN = 10.0
"""Seconds that a broker may take from the connection to its answer."""

_LONGEST_PAUSE = 30
"""Seconds between two attempts to connect."""

_WINDOW = 8
"""Messages on their way at once: enough to fill a link, few enough to hold in memory."""


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Parse ``mqtt://host[:port]``.

        Raises:
            ConfigError: It is not such an address.
        """
        remedy = "write mqtt://host or mqtt://host:port"
        try:
            parts = urlsplit(url)
            port = 1883 if parts.port is None else parts.port
        except ValueError as error:
            raise ConfigError(f"broker: {url!r}: {error}", remedy) from error
        rest = parts.username, parts.password, parts.path.strip("/"), parts.query, parts.fragment
        if parts.scheme != "mqtt" or not parts.hostname or not port or any(part for part in rest):
            raise ConfigError(f"broker: {url!r} is not an address", remedy)
        return cls(parts.hostname, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{host}:{self.port}"


@dataclass(frozen=True)
class Connected:
    """The link is up, for the first time or again; subscriptions are in place."""


@dataclass(frozen=True)
class Disconnected:
    """The link is down; it comes back by itself."""


@dataclass(frozen=True)
class Received:
    """A message.

    Attributes:
        topic: Where it was published.
        payload: Its bytes.
        retained: Whether the broker kept it from earlier.
    """

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Refused:
    """The broker acknowledged a message and dropped it.

    Attributes:
        reason: In the words of MQTT 5, such as ``Not authorized``.
    """

    reason: str


Event = Connected | Disconnected | Received | Refused


class Link:
    """A connection that restores itself.

    Args:
        address: The broker.
        client_id: Unique at the broker.
        subscriptions: Topic filters, subscribed again after every reconnect.
        will: Topic and payload that the broker publishes, retained, when this side dies; None for nothing.
    """

    def __init__(
        self, address: BrokerAddress, client_id: str, *, subscriptions: Iterable[str], will: tuple[str, bytes] | None
    ) -> None:
        self.address = address
        self._client_id = client_id
        self.bytes_in = 0
        self.bytes_out = 0
        self._events: queue.SimpleQueue[Event | BrokerProtocolError] = queue.SimpleQueue()
        self._subscriptions = [(topic, SubscribeOptions(qos=1)) for topic in subscriptions]
        self._answer: ReasonCode | None = None
        self._answered = threading.Event()
        self._closing = False
        self._up = False
        self._max_packet = _MAX_PACKET
        self._since = 0.0
        self._short_lives = 0
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_socket_open = _no_delay
        if will is not None:
            client.will_set(will[0], will[1], qos=1, retain=True)
        client.reconnect_delay_set(min_delay=1, max_delay=_LONGEST_PAUSE)
        client.max_inflight_messages_set(_WINDOW)
        self._client = client

    def connect(self, timeout: float = 10.0) -> None:
        """Connect and wait for the broker's answer.

        Args:
            timeout: Seconds in which a broker must be there; ``math.inf`` to wait for one as long as it takes.

        Raises:
            BrokerUnreachableError: Nothing answers in time.
            BrokerProtocolError: The broker refuses MQTT 5 or this client.
        """
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = _MAX_PACKET
        deadline, pause, said = time.monotonic() + timeout, 0.1, False
        while True:
            try:
                self._client.connect(
                    self.address.host, self.address.port, keepalive=_KEEP_ALIVE, clean_start=True, properties=properties
                )
                break
            except (OSError, mqtt.WebsocketConnectionError) as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(str(error)) from error
                pause = min(_LONGEST_PAUSE, 1.5 * pause)
                if pause > 1 and timeout == math.inf and not said:
                    said = True
                    log.warning("%s; waits for one", self._unreachable(str(error)).what)
                time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - a fleet that wakes together comes one by one
        self._client.loop_start()
        if not self._answered.wait(_ANSWER_WITHIN):
            self.close()
            raise self._unreachable("it accepts connections but does not answer")
        if self._answer is None or self._answer.is_failure:
            self.close()
            raise BrokerProtocolError(
                f"the broker at {self.address} refuses an MQTT 5 connection: "
                f"{self._answer or 'it hung up, as brokers of MQTT 3.1.1 do'}",
                "use a broker that speaks MQTT 5 (Mosquitto 1.6 or newer, or `fleetune broker`)",
            )

    def _unreachable(self, why: str) -> BrokerUnreachableError:
        return BrokerUnreachableError(
            f"no broker answers at {self.address}: {why}",
            f"check the address, or start a broker: Mosquitto, or `fleetune broker` ({install_hint('server')})",
        )

    def close(self) -> None:
        """Disconnect without triggering the Will."""
        self._closing = True
        self._client.disconnect()
        self._client.loop_stop()

    # --- sending ------------------------------------------------------------------------------------------------

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry: int | None = None) -> None:
        """Send one message with QoS 1 and return at once.

        While the link is down it goes nowhere: what must arrive is sent again after :class:`Connected`.
        """
        if self._up:
            self._send(topic, payload, retain=retain, expiry=expiry)

    def publish_many(
        self, messages: Iterable[tuple[str, bytes]], *, expiry: int | None = None, timeout: float = 120.0
    ) -> bool:
        """Send messages through a sliding window.

        Returns:
            True when the broker has acknowledged the last; False if the link went down, or an acknowledgement did not
            come in time: then some may have arrived, and all are to be sent again.
        """
        waiting: deque[mqtt.MQTTMessageInfo] = deque()
        for topic, payload in messages:
            if not self._up:
                return False
            waiting.append(self._send(topic, payload, retain=False, expiry=expiry))
            if len(waiting) >= _WINDOW and not self._acknowledged(waiting.popleft(), timeout):
                return False
        return all(self._acknowledged(info, timeout) for info in waiting)

    def _acknowledged(self, info: mqtt.MQTTMessageInfo, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        try:
            while not info.is_published():
                if not self._up:
                    return False
                if time.monotonic() > deadline:
                    log.warning("the broker at %s did not acknowledge a message within %.0f s", self.address, timeout)
                    return False
                info.wait_for_publish(0.25)
        except RuntimeError:  # paho's word for a connection that is gone
            return False
        return True

    def _send(self, topic: str, payload: bytes, *, retain: bool, expiry: int | None) -> mqtt.MQTTMessageInfo:
        if len(payload) + len(topic) + 64 > self._max_packet:
            # paho would send it, the broker would hang up, and the same would happen again after every reconnect.
            raise BrokerProtocolError(
                f"a message of {len(payload)} bytes exceeds the broker's maximum packet size of {self._max_packet}",
                "raise the broker's limit (Mosquitto: max_packet_size) to 128 KiB or more",
            )
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if expiry is not None:
            properties.MessageExpiryInterval = expiry
        self.bytes_out += len(payload)
        return self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)

    # --- receiving ----------------------------------------------------------------------------------------------

    def events(self, timeout: float) -> Iterator[Event]:
        """Wait up to ``timeout`` seconds for an event, then yield all that are there.

        Raises:
            BrokerProtocolError: The broker ends every connection soon after it is made, as it does for two clients
                with one id.
        """
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return
        while True:
            if isinstance(event, BrokerProtocolError):
                raise event
            yield event
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return

    # --- paho's thread ------------------------------------------------------------------------------------------

    def _on_connect(
        self, client: mqtt.Client, _u: Any, _f: mqtt.ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._answer = reason
        if reason.is_failure:
            self._answered.set()
            return
        self._since = time.monotonic()
        self._max_packet = getattr(properties, "MaximumPacketSize", _MAX_PACKET)
        client.subscribe(self._subscriptions)

    def _on_subscribe(self, _c: mqtt.Client, _u: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        self._answer = next((reason for reason in reasons if reason.is_failure), self._answer)
        self._answered.set()
        self._up = True
        log.info("connected to %s", self.address)
        self._events.put(Connected())

    def _on_disconnect(self, _c: mqtt.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        if not self._answered.is_set():
            self._answer = reason if reason.is_failure else None
            self._answered.set()
        was_up, self._up = self._up, False
        if self._closing:
            return
        if was_up:
            log.warning("the connection to %s is lost; it comes back by itself", self.address)
        self._short_lives = self._short_lives + 1 if time.monotonic() - self._since < _SHORT_LIFE else 0
        self._events.put(Disconnected())
        if self._short_lives == _SHORT_LIVES:
            self._events.put(
                BrokerProtocolError(
                    f"the broker at {self.address} ended {_SHORT_LIVES} connections in a row as soon as they were made",
                    f"see that nothing else connects as {self._client_id!r}: a fleet has one aggregator, and a "
                    "device's id belongs to one agent; else read the broker's log",
                )
            )

    def _on_publish(self, _c: mqtt.Client, _u: Any, _mid: int, reason: ReasonCode, _p: Any) -> None:
        if reason.is_failure:
            self._events.put(Refused(str(reason)))

    def _on_message(self, _c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
        self.bytes_in += len(message.payload)
        self._events.put(Received(message.topic, bytes(message.payload), message.retain))


def _no_delay(_c: mqtt.Client, _u: Any, sock: Any) -> None:
    # Small acknowledgements must not wait for Nagle's algorithm.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
