"""Agents without a pack: the same protocol, state on disk and outbox as any other, and nothing that trains."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import msgspec

from fleetune.edge.agent.agent import Agent
from fleetune.edge.agent.config import AgentConfig
from fleetune.tools.bench.transfer.noop import FLEET, NoOpSpec, NoOpWorker


def main(path: str) -> None:
    """Serve until the process is killed: one agent in the main thread, more of them in threads of their own."""
    logging.basicConfig(level=logging.WARNING)
    spec = msgspec.json.decode(Path(path).read_bytes(), type=NoOpSpec)

    def serve(device: str) -> None:
        state, identity = Path(spec.folder) / device, spec.identity(device)
        config = AgentConfig(device, FLEET, spec.broker, state, spec.codec, identity)
        Agent(config, NoOpWorker(spec.shapes)).run()

    for device in spec.devices[1:]:
        threading.Thread(target=serve, args=[device], daemon=True).start()
    serve(spec.devices[0])


if __name__ == "__main__":
    main(sys.argv[1])
