"""An aggregator that is stopped says so, or the next one would wait for it to leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence, open_envelope
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.bench.transfer.noop import FLEET, NoOpSpec


def test_who_is_stopped_is_offline_to_the_next_one(tmp_path: Path) -> None:
    states: list[str] = []
    with embedded_broker(free_port()) as broker:
        spec = NoOpSpec(host=broker.host, port=broker.port, folder=str(tmp_path / "a"), devices=("d",), shapes={})
        (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec))
        topic = Topics(FLEET).aggregator_presence
        link = Link(broker, "watcher", subscriptions=[topic])
        link.connect()
        command = [sys.executable, "-m", "fleetune.tools.bench.transfer.noop_server", str(tmp_path / "spec.json")]
        aggregator = subprocess.Popen(command, stderr=subprocess.DEVNULL)

        def hear(seconds: float, until: str) -> None:
            end = time.monotonic() + seconds
            while states[-1:] != [until] and time.monotonic() < end:
                for event in link.events(0.1):
                    if isinstance(event, Received):
                        states.append(open_envelope(event.payload, Presence).state)

        hear(20, until="online")
        hear(1.5, until="offline")  # it waits for devices, and says so once
        aggregator.send_signal(signal.SIGINT)
        hear(20, until="offline")
        link.close()
        aggregator.kill()
        aggregator.wait()
    assert states == ["online", "online", "offline"]
