"""A fleet with an authority: identities for all, and Mosquitto with certificates and rights."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.authority.mosquitto import CONFIG, write_broker
from fleetune.server.broker import free_ports
from fleetune.tools.programs import find_program


@dataclass(frozen=True)
class Secured:
    """What a process of such a fleet needs.

    Attributes:
        address: Of the broker.
        identities: Folder with an identity for each device and for ``aggregator``.
        authority: Folder of the authority.
        broker: Folder of the broker.
    """

    address: BrokerAddress
    identities: Path
    authority: Path
    broker: Path


@contextmanager
def secured(
    folder: Path, fleet: str, devices: tuple[str, ...] = (), hosts: tuple[str, ...] = ("127.0.0.1",)
) -> Iterator[Secured]:
    """Make one, and run its broker.

    Args:
        folder: For keys and configuration.
        fleet: Its name.
        devices: Ids of those that are members from the beginning.
        hosts: Names and addresses of the broker; what is on this machine reaches it by the last.

    Raises:
        ConfigError: Mosquitto is not installed.
        RunFailedError: It does not start.
    """
    members, enrolment = free_ports(2)
    site = Site(hosts, members, enrolment)
    with closing(Authority.make(folder / "authority", fleet, site)) as authority:
        authority.make_member("aggregator", folder / "identities" / "aggregator")
        for device in devices:
            authority.make_member("device", folder / "identities" / device, device)
        write_broker(authority, folder / "broker")
    config = folder / "broker" / CONFIG
    config.write_text(f"user root\n{config.read_text(encoding='utf-8')}", encoding="utf-8")
    address = BrokerAddress(hosts[-1], site.port, tls=True)
    with closing(Mosquitto(config, address)) as broker:
        broker.start()
        yield Secured(address, folder / "identities", folder / "authority", folder / "broker")


class Mosquitto:
    """A broker that can be stopped and started again.

    Args:
        config: Its configuration, which lets it listen at the address.
        address: Where it is to be reached.
    """

    def __init__(self, config: Path, address: BrokerAddress) -> None:
        self._config, self._address = config, address
        self._process: psutil.Popen | None = None

    def start(self) -> psutil.Process:
        """Start it, and wait until it listens.

        Raises:
            ConfigError: It is not installed.
            RunFailedError: It does not start.
        """
        program = find_program("mosquitto", "mosquitto")
        command = [program, "-c", str(self._config)]
        self._process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not _listens(self._address):
            if self._process.poll() is not None:
                raise RunFailedError("Mosquitto does not start", f"see: {' '.join(command)}")
            time.sleep(0.02)
        return self._process

    def close(self) -> None:
        """Stop it, if it runs."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


def _listens(address: BrokerAddress) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=1.0).close()
    except OSError:
        return False
    return True
