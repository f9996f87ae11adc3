"""The least that a round could take: its chunks down and up through paho and a broker, and nobody looks at them."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from fleetune.edge.protocol.client import no_delay
from fleetune.edge.protocol.messages import MAX_CHUNK

_CHUNKS = 18
"""1,179,648 bytes."""


def _client(name: str) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
    client.on_socket_open = no_delay
    return client


def device(port: int, name: str) -> None:
    """Answer every broadcast with as many bytes."""
    data, seen = os.urandom(MAX_CHUNK), 0

    def answer(client: Client, _userdata: Any, _message: MQTTMessage) -> None:
        nonlocal seen
        seen += 1
        if seen % _CHUNKS == 0:
            for index in range(_CHUNKS):
                client.publish(f"up/{name}/{index}", data, qos=1)

    client = _client(name)
    client.on_message = answer
    client.connect("127.0.0.1", port)
    client.subscribe("down/+", qos=1)
    client.loop_forever()


def lead(port: int, devices: int, rounds: int) -> None:
    """Print the seconds of each round but the first."""
    data, seen, done = os.urandom(MAX_CHUNK), 0, threading.Event()

    def count(_client: Client, _userdata: Any, _message: MQTTMessage) -> None:
        nonlocal seen
        seen += 1
        if seen == _CHUNKS * devices:
            seen = 0
            done.set()

    client = _client("lead")
    client.on_message = count
    client.connect("127.0.0.1", port)
    client.subscribe("up/#", qos=1)
    client.loop_start()
    time.sleep(1.0 + 0.25 * devices)  # until all of them listen
    for number in range(rounds + 1):
        start = time.perf_counter()
        done.clear()
        for index in range(_CHUNKS):
            client.publish(f"down/{index}", data, qos=1)
        if not done.wait(60):
            sys.exit("a round did not end")
        if number:
            print(time.perf_counter() - start)  # noqa: T201
    client.disconnect()


if __name__ == "__main__":
    if sys.argv[2] == "device":
        device(int(sys.argv[1]), sys.argv[3])
    else:
        lead(int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
