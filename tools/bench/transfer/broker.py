"""Mosquitto, with the configuration that Fleetune asks for, for as long as a benchmark runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import psutil

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.server.broker import free_port

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
    with run_mosquitto(config, address) as process:
        yield address, process


@contextmanager
def run_mosquitto(config: Path, address: BrokerAddress) -> Iterator[psutil.Process]:
    """Run it with a configuration, which lets it listen at an address.

    Raises:
        RunFailedError: It is not installed, or does not start.
    """
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise RunFailedError("Mosquitto is not installed", "install it: apt-get install mosquitto")
    with psutil.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _listens(address):
                if process.poll() is not None:
                    raise RunFailedError("Mosquitto does not start", f"see: {program} -c {config}")
                time.sleep(0.02)
            yield process
        finally:
            process.terminate()


def _listens(address: BrokerAddress) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=1.0).close()
    except OSError:
        return False
    return True
