"""Mosquitto, with the configuration that Fleetune asks for, for as long as a benchmark runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path

import psutil

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.server.broker import free_port
from fleetune.tools.secured import Mosquitto

CONFIG = files("fleetune.server") / "mosquitto.conf"


@contextmanager
def mosquitto(
    folder: Path, host: str = "127.0.0.1", *, endless: bool = False
) -> Iterator[tuple[BrokerAddress, psutil.Process]]:
    """Run it.

    Args:
        folder: For its configuration.
        host: The address that it listens on.
        endless: Whether any number of messages may wait for a client.

    Raises:
        RunFailedError: It is not installed, or does not start.
    """
    port = free_port()
    lines = CONFIG.read_text(encoding="utf-8").replace("listener 1883", f"listener {port} {host}")
    if endless:
        lines = lines.replace("max_queued_messages 4096", "max_queued_messages 0")
    config = folder / "mosquitto.conf"
    config.write_text(f"{lines}\nuser root\n", encoding="utf-8")
    address = BrokerAddress(host, port)
    with closing(Mosquitto(config, address)) as broker:
        yield address, broker.start()
