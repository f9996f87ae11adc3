"""The broker, as a device meets it: a message that is sent to the device's own topic comes back whole, or does not.

Only what comes back proves something. Brokers may grant a subscription that they then deny silently, and acknowledge a
message that reaches nobody.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import BrokerProtocolError, BrokerUnreachableError
from fleetune.edge.protocol.link import Disconnected, Link, Received, Refused
from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.edge.protocol.topics import Topics, check_name
from fleetune.tools.doctor.host import Check

UNREACHABLE, NOT_MQTT_5, PUBLISH_DENIED, NOTHING_BACK, PACKET_TOO_SMALL = 38, 39, 40, 41, 42
"""Exit codes of the check."""

_VERB = "doctor"
_CONNECT_S = 5.0
_BACK_S = 5.0
_EXPIRY_S = 60
_SMALL = 32  # bytes


@dataclass(frozen=True)
class RoundTrip:
    """Whose topic, at which broker.

    Attributes:
        broker: Where the broker listens.
        fleet: Name of the fleet.
        device: The device's id.
    """

    broker: BrokerAddress
    fleet: str
    device: str

    @classmethod
    def parse(cls, broker: str, fleet: str, device: str) -> RoundTrip:
        """From a command line.

        Raises:
            ConfigError: One of them is not valid.
        """
        return cls(BrokerAddress.parse(broker), check_name("--fleet", fleet), check_name("--id", device))

    @property
    def topic(self) -> str:
        """Where the messages go, and come from."""
        return Topics(self.fleet).down(self.device, _VERB)


def check_broker(trip: RoundTrip) -> Check:
    """Whether a device's messages go through, small ones and those of a chunk's size."""
    # Not the agent's own name: the broker would end the connection of one that runs.
    link = Link(trip.broker, f"{trip.fleet}-{trip.device}-{_VERB}", subscriptions=[trip.topic])
    try:
        link.connect(_CONNECT_S)
    except BrokerUnreachableError as error:
        return Check("broker", "failure", error.what, error.remedy, UNREACHABLE)
    except BrokerProtocolError as error:
        return Check("broker", "failure", error.what, error.remedy, NOT_MQTT_5)
    try:
        return _check_trips(link, trip)
    finally:
        link.close()


def _check_trips(link: Link, trip: RoundTrip) -> Check:
    small = _send(link, trip.topic, _SMALL)
    if isinstance(small, Refused | Disconnected):
        why = small.reason if isinstance(small, Refused) else "it hung up"
        return Check(
            "broker",
            "failure",
            f"{trip.broker} refuses to publish on {trip.topic}: {why}",
            f"let the device publish and subscribe there in the broker's ACL (Mosquitto: topic readwrite {trip.topic})",
            PUBLISH_DENIED,
        )
    if small is None:
        return Check(
            "broker",
            "failure",
            f"{trip.broker} took a message on {trip.topic}, and nothing came back within {_BACK_S:.0f} s",
            f"let the device read its topics in the broker's ACL (Mosquitto: topic readwrite {trip.topic})",
            NOTHING_BACK,
        )
    try:
        large = _send(link, trip.topic, MAX_CHUNK)
    except BrokerProtocolError as error:
        return Check("broker", "failure", error.what, error.remedy, PACKET_TOO_SMALL)
    if not isinstance(large, float):
        what = {Refused: "was refused", Disconnected: "made the broker hang up"}.get(type(large), "did not come back")
        return Check(
            "broker",
            "failure",
            f"{trip.broker}: a message of {_SMALL} bytes came back, one of {MAX_CHUNK} {what}",
            "raise the broker's limit (Mosquitto: max_packet_size and message_size_limit) to 128 KiB or more",
            PACKET_TOO_SMALL,
        )
    return Check(
        "broker",
        "ok",
        f"{trip.broker} speaks MQTT 5: {_SMALL} bytes came back after {small * 1000:.0f} ms, {MAX_CHUNK} after "
        f"{large * 1000:.0f} ms",
    )


def _send(link: Link, topic: str, size: int) -> float | Refused | Disconnected | None:
    """Seconds until a message of our own came back; or what the broker did instead; None if that is nothing.

    Raises:
        BrokerProtocolError: The broker announced that it takes no message of this size.
    """
    payload = os.urandom(size)  # nobody else sends the same
    start = time.monotonic()
    link.publish(topic, payload, expiry=_EXPIRY_S)
    while (left := start + _BACK_S - time.monotonic()) > 0:
        for event in link.events(left):
            if isinstance(event, Received) and (event.topic, event.payload) == (topic, payload):
                return time.monotonic() - start
            if isinstance(event, Refused | Disconnected):
                return event
    return None
