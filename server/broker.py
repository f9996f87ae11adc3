"""The embedded MQTT 5 broker: rumqttd inside a process of this machine, on loopback only."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.edge.protocol.errors import BrokerUnreachableError, ConfigError, install_hint
from fleetune.edge.protocol.link import BrokerAddress

_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 262144
max_inflight_count = 200
dynamic_filters = true
"""


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def embedded_broker(port: int) -> Iterator[BrokerAddress]:
    """Run the broker until the block ends.

    It has neither users nor encryption, so it listens on loopback: it is for one machine. Its sessions and retained
    messages live in memory; Fleetune needs neither to survive a restart.

    Raises:
        ConfigError: The ``server`` extra is not installed.
        BrokerUnreachableError: The port is taken.
    """
    try:
        from iotcore import Broker
    except ImportError as error:
        raise ConfigError(
            "the embedded broker is not installed", f"{install_hint('server')}; or use Mosquitto"
        ) from error
    with tempfile.TemporaryDirectory(prefix="fleetune-broker-") as folder:
        config = Path(folder) / "rumqttd.toml"
        config.write_text(_CONFIG.format(port=port), encoding="utf-8")
        try:
            broker = Broker(config_path=str(config))
            broker.start()
        except (OSError, RuntimeError, ValueError) as error:
            raise BrokerUnreachableError(
                f"the embedded broker cannot listen on 127.0.0.1:{port}: {error}", "choose another --port"
            ) from error
        try:
            yield BrokerAddress("127.0.0.1", port)
        finally:
            broker.stop()
