"""Where a broker listens, as users write it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from fleetune.edge.protocol.errors import ConfigError


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Parse ``mqtt://host[:port]``.

        Raises:
            ConfigError: It is not such an address.
        """
        remedy = "write mqtt://host or mqtt://host:port"
        try:
            parts = urlsplit(url)
            port = 1883 if parts.port is None else parts.port
        except ValueError as error:
            raise ConfigError(f"broker: {url!r}: {error}", remedy) from error
        if parts.username or parts.password:
            what = f"broker: the address of {parts.hostname!r} names a user or a password"
            raise ConfigError(what, "leave them out: Fleetune knows no passwords yet")
        rest = parts.path.strip("/"), parts.query, parts.fragment
        if parts.scheme != "mqtt" or not parts.hostname or not port or any(part for part in rest):
            raise ConfigError(f"broker: {url!r} is not an address", remedy)
        return cls(parts.hostname, port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{host}:{self.port}"
