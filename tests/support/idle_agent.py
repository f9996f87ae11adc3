"""A device's agent that trains nothing: python idle_agent.py BROKER FLEET DEVICE STATE AHEAD SOON."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

broker, fleet, device, folder, ahead, soon = sys.argv[1:]
real = time.time
time.time = lambda: real() + float(ahead)  # before anybody takes the clock as it is

from fleetune.edge.agent import agent as agent_module  # noqa: E402
from fleetune.edge.agent import renewal  # noqa: E402
from fleetune.edge.agent.agent import Agent  # noqa: E402
from fleetune.edge.agent.config import AgentConfig  # noqa: E402
from fleetune.edge.protocol.address import BrokerAddress  # noqa: E402
from fleetune.edge.protocol.identity.folder import read_identity  # noqa: E402
from fleetune.tools.bench.transfer.noop import NoOpWorker  # noqa: E402
from fleetune.tools.commands.options import IDENTITY  # noqa: E402

renewal._SOON = float(soon)
agent_module.SAY_EVERY = 1.0
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
identity = read_identity(Path(folder) / IDENTITY)
config = AgentConfig(device, fleet, BrokerAddress.parse(broker), Path(folder), identity=identity)
Agent(config, NoOpWorker({})).run()
