"""Between a device and the broker: messages with tensors come twice, in another order, or damaged."""

from __future__ import annotations

import random
import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.tools.bench.chaos.plan import Habit

_PUBLISH = 3
_BULK = re.compile(rb"ft/1/[^/]+/(up/[^/]+/[^/]+/(m|[0-9]+)|g/[^/]+/(current|[0-9a-f]{64}/(r/)?[0-9]+))")
"""Topics of chunks and manifests, up and down."""

_SHARE: dict[Habit, float] = {"twice": 0.15, "swap": 0.15, "flip": 0.05}
"""Of the messages that could be garbled, those that are. One bit makes a whole payload worthless."""

_HOLD_S = 0.1
"""Seconds that a message waits for the next to swap places with."""


class Proxy:
    """Listens on a port of its own until it is closed.

    Args:
        broker: Where messages go.
        habits: What it does to them.
        seed: For chance.

    Attributes:
        address: Where a device connects to.
        garbled: Habit → messages that it was done to.
    """

    def __init__(self, broker: BrokerAddress, habits: tuple[Habit, ...], seed: int) -> None:
        self._broker, self._habits, self._random = broker, habits, random.Random(seed)  # noqa: S311
        self.garbled = dict.fromkeys(habits, 0)
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server((broker.host, 0))
        self.address = BrokerAddress(broker.host, self._listener.getsockname()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Hang up on everyone."""
        for open_one in (self._listener, *self._sockets):
            with suppress(OSError):
                open_one.shutdown(socket.SHUT_RDWR)
            open_one.close()

    def _listen(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection((self._broker.host, self._broker.port), timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            for packet in self._garbled(source):
                sink.sendall(packet)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _garbled(self, source: socket.socket) -> Iterator[bytes]:
        held = b""
        for packet in _packets(source):
            if packet and is_bulk(packet):
                if self._chance("flip"):
                    packet = flip(packet, self._random)
                if self._chance("twice"):
                    yield packet
                if not held and self._chance("swap"):
                    held = packet
                    continue
            yield packet
            if held:
                yield held
                held = b""

    def _chance(self, habit: Habit) -> bool:
        if habit not in self.garbled or self._random.random() >= _SHARE[habit]:
            return False
        self.garbled[habit] += 1
        return True


def _packets(source: socket.socket) -> Iterator[bytes]:
    """The packets of a connection; an empty one when none came for a while."""
    data = bytearray()
    while True:
        while (size := _size(data)) and len(data) >= size:
            yield bytes(data[:size])
            del data[:size]
        if not select.select([source], [], [], _HOLD_S)[0]:
            yield b""
        elif more := source.recv(65536):
            data += more
        else:
            return


def _head(packet: bytes | bytearray) -> tuple[int, int]:
    """Bytes of a packet's head and of the rest; 0 while the head is not whole."""
    rest = 0
    for number, byte in enumerate(packet[1:5]):  # the variable byte integer of every MQTT packet
        rest |= (byte & 127) << 7 * number
        if byte < 128:
            return number + 2, rest
    return 0, 0


def _size(packet: bytes | bytearray) -> int:
    head, rest = _head(packet)
    return head + rest if head else 0


def is_bulk(packet: bytes) -> bool:
    """Whether a packet publishes a chunk or a manifest."""
    return packet[0] >> 4 == _PUBLISH and _BULK.fullmatch(_topic(packet)) is not None


def _topic(packet: bytes) -> bytes:
    head, _ = _head(packet)
    return packet[head + 2 : head + 2 + int.from_bytes(packet[head : head + 2], "big")]


def flip(packet: bytes, chance: random.Random) -> bytes:
    """The same PUBLISH with a few bits of its payload changed."""
    head, _ = _head(packet)
    properties = head + 2 + len(_topic(packet)) + (2 if packet[0] & 0b110 else 0)  # behind topic and packet identifier
    more, length = _head(packet[properties - 1 :])
    start, garbled = properties - 1 + more + length, bytearray(packet)
    for _ in range(min(3, len(packet) - start)):
        garbled[chance.randrange(start, len(packet))] ^= 1 << chance.randrange(8)
    return bytes(garbled)
