"""The aggregator of the chaos benchmark: it keeps every round's updates and global tensors, to be looked at after."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from fleetune.edge.protocol.link import BrokerAddress
from fleetune.server import aggregator
from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.job import Job
from fleetune.tools.bench.chaos_process import ChaosSpec, bend_clock
from fleetune.tools.bench.noop import BACKBONE, FLEET

JOB = "chaos"


def main(path: str) -> None:
    """Lead one job to its end."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d %(levelname)s %(message)s")
    spec = msgspec.json.decode(Path(path).read_bytes(), type=ChaosSpec)
    bend_clock(spec.clock)
    aggregator._CHECKPOINT_ROUNDS = spec.checkpoint_rounds  # a run has too few rounds to come to one by itself
    job = Job(
        id=JOB,
        method="fedms",
        backbone=BACKBONE,
        quantisation="nf4",
        shapes=spec.shapes,
        rounds={"global": spec.rounds, "personal": 0},
        settings={"max_depth": 12},
        codec=spec.codec,
    )
    config = AggregatorConfig(
        fleet=FLEET,
        broker=BrokerAddress(spec.host, spec.port),
        state=Path(spec.folder),
        jobs=(job,),
        devices=frozenset(spec.devices),
        buffer=spec.buffer,
        quorum=len(spec.devices) if spec.quorum is None else spec.quorum,
        keep_history=True,
    )
    Aggregator(config).run()


if __name__ == "__main__":
    main(sys.argv[1])
