"""The aggregator of rounds in which nobody trains; what each took is in its journal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from fleetune.server.aggregator import Aggregator, AggregatorConfig
from fleetune.server.job import Job
from fleetune.tools.bench.transfer.noop import BACKBONE, FLEET, JOB, NoOpSpec


def config_for(spec: NoOpSpec, *, keep_history: bool = False) -> AggregatorConfig:
    """How the aggregator of a benchmark is started."""
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
    return AggregatorConfig(
        fleet=FLEET,
        broker=spec.broker,
        state=Path(spec.folder),
        jobs=(job,),
        devices=frozenset(spec.devices),
        quorum=len(spec.devices) if spec.quorum is None else spec.quorum,
        buffer=spec.buffer,
        keep_history=keep_history,
        identity=spec.identity("aggregator"),
    )


def main(path: str) -> None:
    """Lead one job to its end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    Aggregator(config_for(msgspec.json.decode(Path(path).read_bytes(), type=NoOpSpec))).run()


if __name__ == "__main__":
    main(sys.argv[1])
