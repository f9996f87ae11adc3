"""The broker, as a device meets it: what it sends on its own topic comes back, and on others' it may not send.

Only what comes back proves something. Brokers may grant a subscription that they then deny silently, and acknowledge a
message that reaches nobody.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import (
    BrokerProtocolError,
    BrokerUnreachableError,
    IdentityError,
    KeyExposedError,
)
from fleetune.edge.protocol.identity.folder import read_identity
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Disconnected, Link, Received, Refused
from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.edge.protocol.topics import Topics, check_name
from fleetune.tools.doctor.host import Check

UNREACHABLE, NOT_MQTT_5, PUBLISH_DENIED, NOTHING_BACK, PACKET_TOO_SMALL = 38, 39, 40, 41, 42
NO_ENTRY, RIGHTS_TOO_WIDE = 44, 45
"""Exit codes of the check."""

_VERB = "echo"
_SOMEBODY_ELSE = "fleetune-doctor"
"""A device that no fleet has: nobody is disturbed by what is sent in its name."""
_CONNECT_S = 5.0
_BACK_S = 5.0
_ANSWER_S = 30.0
"""Seconds for each answer about rights: a board that boots has much else to do."""
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
        return Topics(self.fleet).up(self.device, _VERB)


def check_broker(trip: RoundTrip, identity: Path | None = None) -> Check:
    """Whether a device's messages go through, small ones and those of a chunk's size, and nobody else's.

    Args:
        trip: Whose, and where.
        identity: Folder of the device's identity, if it has one.
    """
    try:
        seals = Seals(None if identity is None else read_identity(identity))
        link = Link(trip.broker, f"{trip.fleet}-{trip.device}-doctor", subscriptions=[trip.topic], seals=seals)
        link.connect(_CONNECT_S)
    except BrokerUnreachableError as error:
        return Check("broker", "failure", error.what, error.remedy, UNREACHABLE)
    except BrokerProtocolError as error:
        return Check("broker", "failure", error.what, error.remedy, NOT_MQTT_5)
    except (IdentityError, KeyExposedError) as error:
        return Check("broker", "failure", error.what, error.remedy, NO_ENTRY)
    try:
        found = _check_trips(link, trip)
        return _check_rights(link, trip, found) if found.verdict == "ok" else found
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
            f"let the device write there in the broker's ACL (Mosquitto: topic write {trip.topic})",
            PUBLISH_DENIED,
        )
    if small is None:
        return Check(
            "broker",
            "failure",
            f"{trip.broker} took a message on {trip.topic}, and nothing came back within {_BACK_S:.0f} s",
            f"let the device read there in the broker's ACL (Mosquitto: topic read {trip.topic})",
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


def _check_rights(link: Link, trip: RoundTrip, found: Check) -> Check:
    """What the round trip found, if the broker refuses what is sent in other names."""
    topics = Topics(trip.fleet)
    forbidden = (
        topics.up(_SOMEBODY_ELSE, _VERB),
        topics.down(_SOMEBODY_ELSE, _VERB),
        topics.presence(_SOMEBODY_ELSE),
        topics.broadcast_chunk(_SOMEBODY_ELSE, _VERB, 0),
    )
    refused = {topic: _is_refused(link, topic) for topic in forbidden}
    if None in refused.values():
        return Check(
            "broker",
            "failure",
            f"{trip.broker} has not said in {_ANSWER_S:.0f} s whether this device may speak for others",
            "try again when this machine, the broker's, and the link have less to do",
            UNREACHABLE,
        )
    taken = [topic for topic, so in refused.items() if not so]
    if not taken:
        return found._replace(found=f"{found.found}; it refuses what is sent in other names")
    what = f"{trip.broker} lets this device write to {', '.join(taken)}: any device may speak for every other"
    fix = "write the broker's rights with `fleetune fleet init`"
    if link.seals.signed and trip.broker.tls:
        return Check("broker", "failure", what, fix, RIGHTS_TOO_WIDE)
    return Check("broker", "note", f"{found.found}; {what}", f"{fix}, unless nobody else reaches the broker")


def _is_refused(link: Link, topic: str) -> bool | None:
    """Whether the broker refuses a message; None if it does not say, which is no leave."""
    link.publish(topic, b"", expiry=1)
    end = time.monotonic() + _ANSWER_S
    while (left := end - time.monotonic()) > 0 and not link.idle:
        if any(isinstance(event, Refused | Disconnected) for event in link.events(left)):
            return True
    return False if link.idle else None


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
