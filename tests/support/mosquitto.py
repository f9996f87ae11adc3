"""Debian's Mosquitto, with the limits that a test is about."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest

from fleetune.edge.protocol.link import BrokerAddress
from fleetune.server.broker import free_port


@contextmanager
def mosquitto(folder: Path, *lines: str) -> Iterator[BrokerAddress]:
    program = which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        pytest.skip("Mosquitto is not installed (apt-get install mosquitto)")
    port = free_port()
    config = folder / "mosquitto.conf"
    own = (f"listener {port} 127.0.0.1", "allow_anonymous true", "user root")  # who may read pytest's folders
    config.write_text("\n".join([*own, *lines]) + "\n")
    process = subprocess.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield BrokerAddress("127.0.0.1", port)
    finally:
        process.terminate()
        process.wait()
