"""A fleet with an authority: identities for all, and Mosquitto with certificates and rights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.authority.mosquitto import CONFIG, write_broker
from fleetune.server.broker import free_ports
from fleetune.tools.bench.transfer.broker import run_mosquitto
from fleetune.tools.bench.transfer.noop import FLEET


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
def secured(folder: Path, devices: tuple[str, ...]) -> Iterator[Secured]:
    """Make one, and run its broker.

    Args:
        folder: For keys and configuration.
        devices: Ids.

    Raises:
        RunFailedError: Mosquitto is not installed, or does not start.
    """
    members, enrolment = free_ports(2)
    site = Site(("127.0.0.1",), members, enrolment)
    with closing(Authority.make(folder / "authority", FLEET, site)) as authority:
        authority.make_member("aggregator", folder / "identities" / "aggregator")
        for device in devices:
            authority.make_member("device", folder / "identities" / device, device)
        write_broker(authority, folder / "broker")
    config = folder / "broker" / CONFIG
    config.write_text(f"user root\n{config.read_text(encoding='utf-8')}", encoding="utf-8")
    address = BrokerAddress("127.0.0.1", site.port, tls=True)
    with run_mosquitto(config, address):
        yield Secured(address, folder / "identities", folder / "authority", folder / "broker")
