"""What an agent is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.link import BrokerAddress
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.limits import Budget


@dataclass(frozen=True)
class AgentConfig:
    """What an agent is started with.

    Attributes:
        device: Its id.
        fleet: The fleet it belongs to.
        broker: Where the broker listens.
        pack: The pack's folder.
        data: The device's data file.
        state: Its state folder.
        budget: What it may spend.
        threads: Threads of ONNX Runtime; 0 means one for each core.
        codec: Number format of what goes up.
        costs: Costs that were measured on this device before; measured anew where none of them fits.
        sensors: Folder with the `/sys` that heat is read from; another one than the system's is for rehearsals.
        throttles_c: Degrees from which the board throttles, where its sensors name no limit.
    """

    device: str
    fleet: str
    broker: BrokerAddress
    pack: Path
    data: Path
    state: Path
    budget: Budget
    threads: int = 0
    codec: str = "f16"
    costs: tuple[Costs, ...] = ()
    sensors: Path = Path("/")
    throttles_c: float | None = None
