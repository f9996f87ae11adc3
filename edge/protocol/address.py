"""Where a broker listens, as users write it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from fleetune.edge.protocol.errors import ConfigError

_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker listens, and whether it speaks TLS there."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Parse ``mqtt://host[:port]``, or ``mqtts://`` for TLS.

        Raises:
            ConfigError: It is not such an address.
        """
        remedy = "write mqtts://host or mqtts://host:port, or mqtt:// without TLS"
        try:
            parts = urlsplit(url)
            port = _PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
        except ValueError as error:
            raise ConfigError(f"broker: {url!r}: {error}", remedy) from error
        if parts.username or parts.password:
            what = f"broker: the address of {parts.hostname!r} names a user or a password"
            raise ConfigError(what, "leave them out: a device shows its certificate instead")
        rest = parts.path.strip("/"), parts.query, parts.fragment
        if parts.scheme not in _PORTS or not parts.hostname or not port or any(part for part in rest):
            raise ConfigError(f"broker: {url!r} is not an address", remedy)
        return cls(parts.hostname, port, parts.scheme == "mqtts")

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, where nobody else listens."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
