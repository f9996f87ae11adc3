"""The MQTT 5 connection, for devices and the aggregator alike.

paho-mqtt runs the network in a thread of its own; its callbacks only put events on a queue, and everything else
happens in the thread that calls :meth:`Link.events`. Each connection is a client of its own: paho would send what was
on its way over the one before once more, in ignorance of what has become of it.

A client id ends in random letters: whoever knew it could take the connection's place at the broker.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.client import MAX_PACKET, Client, no_delay
from fleetune.edge.protocol.errors import BrokerProtocolError, IdentityError
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.identity.tls import client_context, out_of_date
from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.edge.protocol.sending import Sending
from fleetune.edge.protocol.unreachable import why_not

log = logging.getLogger(__name__)

_OVERHEAD = 512
"""Bytes of a packet beside its payload, at most: its topic, its properties, its lengths."""

_LEAST_PACKET = 8 * 1024
"""Bytes that a broker must take: no manifest is larger."""

_SHORT_LIFE = 5.0
"""Seconds; a connection that breaks sooner after it was made is one that the broker ended."""

_SHORT_LIVES = 5
"""So many of them in a row are no accident."""

_KEEP_ALIVE = 15
"""Seconds between signs of life; after half as many more a broker says that this side is gone."""

_ANSWER_WITHIN = 10.0
"""Seconds that a broker may take from the connection to its answer."""

_LAST_WORDS = 1.0
"""Seconds that a broker may take to acknowledge what was said before the end."""

_SAY_WHY_AFTER = 3
"""Attempts to connect anew after which it is looked into, and said, why they fail."""

_LONGEST_PAUSE = 30
"""Seconds between two attempts to connect."""

_WINDOW = 8
"""Messages on their way at once: enough to fill a link, few enough to hold in memory."""

_RECEIVE_MAXIMUM = 10
"""Messages that a broker may be left to acknowledge at once; no broker asks for less. More wait in paho's queue."""

_MAX_QUEUED = 16 << 20
"""Bytes that came and wait to be looked at; beyond that the network's thread stops reading, and the broker notices."""


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

    @property
    def size(self) -> int:
        """Bytes that it takes while it waits, about."""
        return len(self.payload) + len(self.topic) + _OVERHEAD


@dataclass(frozen=True)
class Refused:
    """The broker acknowledged a message and dropped it.

    Attributes:
        reason: In the words of MQTT 5, such as ``Not authorized``.
    """

    reason: str


@dataclass(frozen=True)
class _Published:
    """The broker has acknowledged a message."""

    mid: int


Event = Connected | Disconnected | Received | Refused


class Link:
    """A connection that restores itself.

    Args:
        address: The broker.
        name: Begins the client id.
        subscriptions: Topic filters, subscribed again after every reconnect, in this order.
        will: Makes topic and message that the broker publishes, retained, when this side dies; None for nothing.
        seals: Sign what is said; nothing is signed without.
        context: Makes what TLS connects with; by default from the identity that signs.
        client_id: The whole client id, where a broker's rules know it; else it begins with the name.

    Attributes:
        seals: Sign what goes out, verify what comes in.
        bytes_in: Payload bytes received.
        bytes_out: Payload bytes sent.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        *,
        subscriptions: Iterable[str],
        will: Callable[[], tuple[str, msgspec.Struct]] | None = None,
        seals: Seals | None = None,
        context: Callable[[], ssl.SSLContext] | None = None,
        client_id: str | None = None,
    ) -> None:
        self.address, self.seals = address, seals or Seals()
        self._context = context or self._own_context
        self._client_id, self._will = client_id or f"{name}-{secrets.token_hex(8)}", will
        self.bytes_in = self.bytes_out = 0
        self._subscriptions = dict.fromkeys(subscriptions)
        self._events: queue.SimpleQueue[Event | _Published | BrokerProtocolError] = queue.SimpleQueue()
        self._queued, self._room = 0, threading.Condition()
        self._sendings: list[Sending] = []
        self._receive_maximum = _RECEIVE_MAXIMUM
        self._bulk = 0  # messages of sendings that are on their way
        self._on_their_way: dict[int, tuple[int, Sending | None]] = {}  # mid → bytes, and what it belongs to
        self._answer: ReasonCode | None = None
        self._answered = self._refused = False
        self._first_subscription: int | None = None
        self._closing = False
        self._up = False
        self._max_packet = self._trusted = MAX_PACKET
        self._largest_taken = self._hangups = 0
        self._since, self._short_lives, self._failures, self._open_at = 0.0, 0, 0, math.inf
        self._said_why = False
        self._client = self._new_client()

    def _new_client(self) -> mqtt.Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_socket_open = no_delay
        if self._will is not None:
            topic, message = self._will()
            client.will_set(topic, self.seals.seal(topic, message), qos=1, retain=True)
        if self.address.tls:
            client.tls_set_context(self._context())
        client.max_inflight_messages_set(self._receive_maximum)
        return client

    def _own_context(self) -> ssl.SSLContext:
        self.seals.refresh()
        identity = self.seals.identity
        if identity is None:
            raise IdentityError(
                f"{self.address} wants a certificate, and this machine has no identity",
                "name its folder with --identity: what `fleetune enroll` made on a device, or for the aggregator "
                "authority/members/aggregator",
            )
        return client_context(identity.folder)

    def _open(self) -> None:
        """Begin to connect, in paho's thread."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MAX_PACKET
        self._open_at = math.inf
        self._client.loop_stop()
        self._client = self._new_client()
        self._client.connect_async(
            self.address.host, self.address.port, keepalive=_KEEP_ALIVE, clean_start=True, properties=properties
        )
        self._client.loop_start()

    def connect(self, timeout: float = 10.0) -> None:
        """Connect and wait for the broker's answer.

        Args:
            timeout: Seconds in which a broker must be there; ``math.inf`` to wait for one as long as it takes.

        Raises:
            BrokerUnreachableError: Nothing answers in time.
            BrokerProtocolError: The broker refuses MQTT 5 or this client.
            IdentityError: One side's certificate does not satisfy the other.
        """
        start = time.monotonic()
        self._open()
        while not self._answered:
            waited = time.monotonic() - start
            silent = waited > _ANSWER_WITHIN and self._client.socket() is not None
            refused, self._refused = self._refused, False
            if waited > timeout or (timeout < math.inf and refused) or silent:
                self.close()
                raise why_not(self.address, self._context, self.seals.clock)
            if waited > 1:
                self._say_why("waits for one")
            if time.monotonic() > self._open_at:
                self._open()
            time.sleep(0.005)
        if self._answer is None or self._answer.is_failure:
            self.close()
            raise BrokerProtocolError(
                f"the broker at {self.address} refuses an MQTT 5 connection: "
                f"{self._answer or 'it hung up, as brokers of MQTT 3.1.1 do, and those that speak TLS at this port'}",
                "use mqtts:// for TLS, else a broker of MQTT 5 (Mosquitto 1.6 or newer, or `fleetune broker`)",
            )
        self._up, self._said_why = True, False

    def reconnect(self) -> None:
        """Connect anew, with what the identity holds now."""
        self._client.disconnect()

    def close(self) -> None:
        """Disconnect without triggering the Will, once the broker has what was said last, or takes too long."""
        until = time.monotonic() + _LAST_WORDS
        while self._up and self._on_their_way and time.monotonic() < until:
            try:
                for _ in self.events(0.05):
                    pass
            except BrokerProtocolError as error:
                log.warning("closing: %s", error.what)
                break
        self._closing = True
        self._client.disconnect()
        self._client.loop_stop()

    # --- sending ------------------------------------------------------------------------------------------------

    @property
    def max_chunk(self) -> int:
        """Bytes of the largest chunk that the broker takes."""
        return min(MAX_CHUNK, self._max_packet - _OVERHEAD)

    def say(self, topic: str, message: msgspec.Struct, *, retain: bool = False, expiry: int | None = None) -> None:
        """Seal one message and publish it."""
        if self._up:
            self.publish(topic, self.seals.seal(topic, message), retain=retain, expiry=expiry)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry: int | None = None) -> None:
        """Send one message with QoS 1 and return at once.

        While the link is down it goes nowhere: what must arrive is sent again after :class:`Connected`.
        """
        if self._up:
            self._send(topic, payload, None, retain=retain, expiry=expiry)

    def send(self, messages: Iterable[tuple[str, bytes]], *, expiry: int | None = None) -> Sending:
        """Send many messages with QoS 1, as fast as the broker acknowledges them, while events are looked at.

        Args:
            messages: Topics and payloads; one is taken when its turn comes.
            expiry: Seconds that the broker keeps each for somebody who is not there.
        """
        sending = Sending(messages, expiry)
        self._sendings.append(sending)
        self._fill_window()
        return sending

    def _fill_window(self) -> None:
        for sending in self._sendings:
            if not self._up:
                sending.lost = True
            while sending.waits and self._bulk < _WINDOW:
                topic, payload, expiry = sending.next()
                self._bulk += 1
                self._send(topic, payload, sending, retain=False, expiry=expiry)
        self._sendings = [sending for sending in self._sendings if sending.waits]

    def _send(self, topic: str, payload: bytes, sending: Sending | None, *, retain: bool, expiry: int | None) -> None:
        if len(payload) + len(topic) + 64 > self._max_packet:
            # paho would send it, the broker would hang up, and the same would happen again after every reconnect.
            raise BrokerProtocolError(
                f"a message of {len(payload)} bytes exceeds the broker's maximum packet size of {self._max_packet}",
                "raise the broker's limit (Mosquitto: max_packet_size) to 128 KiB or more",
            )
        properties = None
        if expiry is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = expiry
        self.bytes_out += len(payload)
        mid = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties).mid
        self._on_their_way[mid] = len(payload), sending

    @property
    def idle(self) -> bool:
        """Whether the broker has acknowledged all that was sent."""
        return not self._on_their_way

    def subscribe(self, topic: str) -> None:
        """Hear another topic from now on."""
        if topic not in self._subscriptions:
            self._subscriptions[topic] = None
            if self._up:
                self._client.subscribe(topic, options=SubscribeOptions(qos=1))

    def unsubscribe(self, topic: str) -> None:
        """Hear it no more."""
        if topic in self._subscriptions:
            del self._subscriptions[topic]
            if self._up:
                self._client.unsubscribe(topic)

    # --- receiving ----------------------------------------------------------------------------------------------

    def events(self, timeout: float) -> Iterator[Event]:
        """Wait up to ``timeout`` seconds for an event, then yield all that are there.

        Raises:
            BrokerProtocolError: The broker ends every connection soon after it is made, or it takes no message of the
                size that a manifest needs.
        """
        pause = self._open_at - time.monotonic()
        if pause <= 0:
            if self._failures >= _SAY_WHY_AFTER:
                self._say_why("tries again")
            self._open()
        try:
            event = self._events.get(timeout=max(0.0, min(timeout, pause) if pause > 0 else timeout))
        except queue.Empty:
            return
        while True:
            if isinstance(event, BrokerProtocolError):
                raise event
            if isinstance(event, _Published):
                self._acknowledge(event.mid)
            else:
                if isinstance(event, Connected):
                    self._restored()
                elif isinstance(event, Disconnected):
                    self._broken()
                elif isinstance(event, Received):
                    with self._room:
                        self._queued -= event.size
                        self._room.notify()
                yield event
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return

    def _acknowledge(self, mid: int) -> None:
        size, sending = self._on_their_way.pop(mid, (0, None))
        self._largest_taken = max(self._largest_taken, size)
        if sending is not None:
            sending.acknowledged()
            self._bulk -= 1
            self._fill_window()

    def _restored(self) -> None:
        self._up, self._said_why = True, False
        self._failures = self._short_lives
        log.info("connected to %s", self.address)

    def _say_why(self, and_now: str) -> None:
        """Why there is no connection, once until there is one."""
        if not self._said_why:
            self._said_why = True
            why = why_not(self.address, self._context, self.seals.clock)
            log.warning("%s; %s (%s)", why.what, and_now, why.remedy)

    def _broken(self) -> None:
        if self._up:
            log.warning("the connection to %s is lost; it comes back by itself", self.address)
        self._up = False
        self._suspect(max((size for size, _ in self._on_their_way.values()), default=0))
        for _, sending in self._on_their_way.values():
            if sending is not None:
                sending.lost = True
        self._on_their_way.clear()
        self._bulk = 0
        self._fill_window()
        self._open_later()

    def _open_later(self) -> None:
        """A fleet that lost its broker comes back one by one, and asks less and less often."""
        longest = min(_LONGEST_PAUSE, 0.5 * 2**self._failures)
        self._open_at = time.monotonic() + random.uniform(longest / 4, longest)  # noqa: S311 - jitter
        self._failures += 1

    def _suspect(self, size: int) -> None:
        """Some brokers hang up at a large packet without a word; two times in a row are taken for one of those."""
        self._hangups = self._hangups + 1 if size > self._largest_taken else 0
        if self._hangups >= 2 and self._trusted > _LEAST_PACKET:
            self._hangups = 0
            self._trusted = max(_LEAST_PACKET, min(self._trusted, size + _OVERHEAD) // 2)
            self._max_packet = min(self._max_packet, self._trusted)
            log.warning(
                "the broker at %s hung up twice at messages of %d bytes; goes on with chunks of %d",
                *(self.address, size, self.max_chunk),
            )

    # --- paho's thread ------------------------------------------------------------------------------------------

    def _on_connect(
        self, client: mqtt.Client, _u: Any, _f: mqtt.ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._since = time.monotonic()
        if self._is_out_of_date(client):
            client.disconnect()
            return
        self._answer = reason
        if reason.is_failure:
            self._answered = True
            return
        self._max_packet = min(self._trusted, getattr(properties, "MaximumPacketSize", MAX_PACKET))
        # paho takes it for the next connection only; a broker that is asked for too much ends this one.
        self._receive_maximum = min(_RECEIVE_MAXIMUM, getattr(properties, "ReceiveMaximum", _RECEIVE_MAXIMUM))
        topics = [(topic, SubscribeOptions(qos=1)) for topic in self._subscriptions]
        self._first_subscription = client.subscribe(topics)[1]

    def _is_out_of_date(self, client: mqtt.Client) -> bool:
        """Whether the broker's certificate has expired for sure; the handshake does not look at time."""
        sock = client.socket()
        certificate = sock.getpeercert() if isinstance(sock, ssl.SSLSocket) else None
        return bool(out_of_date(certificate or {}, self.seals.clock.at_least))

    def _on_connect_fail(self, _c: mqtt.Client, _u: Any) -> None:
        self._refused = self.address.tls
        self._open_later()

    def _on_subscribe(self, client: mqtt.Client, _u: Any, mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        if mid != self._first_subscription or client is not self._client:
            return  # of a topic that was added later
        self._answer = next((reason for reason in reasons if reason.is_failure), self._answer)
        self._answered = True
        if self._max_packet < _LEAST_PACKET:
            self._events.put(
                BrokerProtocolError(
                    f"the broker at {self.address} takes messages of {self._max_packet} bytes at most",
                    "raise its limit (Mosquitto: max_packet_size) to 128 KiB or more",
                )
            )
        self._events.put(Connected())

    def _on_disconnect(self, client: mqtt.Client, _u: Any, _f: Any, reason: ReasonCode, _p: Any) -> None:
        if not self._answered and self.address.tls and client is self._client:
            self._refused = True  # TLS 1.3: a certificate is refused after the handshake
            self._open_later()
            return
        if not self._answered:
            self._answer = reason if reason.is_failure else None
            self._answered = True
        if self._closing or client is not self._client:
            return
        self._short_lives = self._short_lives + 1 if time.monotonic() - self._since < _SHORT_LIFE else 0
        self._events.put(Disconnected())
        if self._short_lives == _SHORT_LIVES:
            self._events.put(
                BrokerProtocolError(
                    f"the broker at {self.address} ended {_SHORT_LIVES} connections in a row as soon as they were made",
                    "read the broker's log",
                )
            )

    def _on_publish(self, _c: mqtt.Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
        self._events.put(_Published(mid))
        if reason.is_failure:
            self._events.put(Refused(str(reason)))

    def _on_message(self, _c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
        try:
            received = Received(message.topic, bytes(message.payload), message.retain)
        except UnicodeDecodeError:  # no topic at all, which a good broker would not pass on
            return
        self.bytes_in += len(received.payload)
        with self._room:
            while self._queued > _MAX_QUEUED and not self._closing:
                self._room.wait(0.5)
            self._queued += received.size
        self._events.put(received)
