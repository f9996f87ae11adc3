"""What an agent is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fleetune.edge.agent.privacy import PrivacyLimits
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import DEFAULT
from fleetune.edge.protocol.identity.folder import Identity


@dataclass(frozen=True)
class AgentConfig:
    """What an agent is started with, whatever does its rounds.

    Attributes:
        device: Its id.
        fleet: The fleet it belongs to.
        broker: Where the broker listens.
        state: Its state folder.
        codec: How tensors become bytes on their way up.
        identity: Who it is; without one nothing is signed.
        privacy: What the device's owner asks of a job.
    """

    device: str
    fleet: str
    broker: BrokerAddress
    state: Path
    codec: str = DEFAULT
    identity: Identity | None = None
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)
