"""The embedded MQTT 5 broker: rumqttd inside a process of this machine, on loopback only."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerUnreachableError, ConfigError, install_hint
from fleetune.edge.protocol.topics import PROTOCOL

_CONFIG = """\
id = 0

[router]
id = 0
# One more gets no answer at all.
max_connections = 10010
# Of QoS 0, which Fleetune does not use. Of QoS 1 a subscriber has up to 100 messages to acknowledge: that is built in,
# whatever Receive Maximum it announces.
max_outgoing_packet_count = 200
# For each topic filter that was ever subscribed to, the broker keeps a log in memory and never empties it: when all
# segments are full, the first one goes. Publishers are acknowledged once their message is in the log. A subscriber that
# lags by more than the log holds loses the oldest messages, and nobody is told. So this is the broker's memory, and how
# far a subscriber may lag. On most topics messages are small: assignments, presence, acknowledgements.
max_segment_size = 1048576
max_segment_count = 4

# All devices share one log of broadcasts, and the aggregator reads all uploads from another: each holds a payload of
# 64 MiB and half of that again, however late its readers are.
[router.custom_segment."{root}/+/g/#"]
max_segment_size = 16777216
max_segment_count = 7

[router.custom_segment."{root}/+/up/#"]
max_segment_size = 16777216
max_segment_count = 7

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
# A pause after every connection; without one a fleet that comes at once is in twice as fast.
next_connection_delay_ms = 0

[v5.1.connections]
# How long a connection may take to say CONNECT.
connection_timeout_ms = 10000
# Of a whole packet. It is not announced to clients, and the broker hangs up on more without a reason. Twice what
# Fleetune sends, and what it asks of any other broker.
max_payload_size = 131072
# Packets that are read from one connection before the others have their turn.
max_inflight_count = 100
dynamic_filters = true
"""


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Different ports on loopback that nothing listens on now."""
    with ExitStack() as stack:  # each is held until all are found: one that was let go may be given out again
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


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
        config.write_text(_CONFIG.format(port=port, root=f"ft/{PROTOCOL}"), encoding="utf-8")
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
