"""paho's client, bounded in what it takes at once, and with fewer calls to the socket."""

from __future__ import annotations

import socket
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode

from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_MESSAGE

MAX_PACKET = max(MAX_CHUNK, MAX_MESSAGE) + 4096
"""Bytes of the largest packet, with room for what a broker may add: some drop silently what is larger than this."""

_AT_ONCE = 1 << 16
"""Bytes that are asked of the socket."""


class Client(mqtt.Client):
    """One connection; a second one is another client.

    paho asks the socket for the one to five bytes of a header one by one. Each call hands the interpreter to another
    thread, which may keep it for milliseconds; so what has come is taken as a whole, and paho reads from that.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._came, self._taken = b"", 0

    def _sock_recv(self, bufsize: int) -> bytes:
        """What is there; of a packet that is larger than any that was asked for, nothing, as if the broker hung up.

        By itself paho takes as much memory at once as a broker says that a packet has.
        """
        if bufsize > MAX_PACKET:
            return b""
        if self._taken == len(self._came):
            self._came, self._taken = super()._sock_recv(max(bufsize, _AT_ONCE)), 0
        start, self._taken = self._taken, min(self._taken + bufsize, len(self._came))
        return self._came[start : self._taken]

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Read packets until nothing is left of what has come: no ``select`` would tell of it."""
        result = super().loop_read(max_packets)
        while result == MQTTErrorCode.MQTT_ERR_SUCCESS and self._taken < len(self._came) and self.socket() is not None:
            result = super().loop_read(max_packets)
        return result


def no_delay(_c: mqtt.Client, _u: Any, sock: Any) -> None:
    """Small acknowledgements must not wait for Nagle's algorithm: for paho's ``on_socket_open``."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
