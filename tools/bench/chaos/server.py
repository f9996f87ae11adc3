"""The aggregator of the chaos benchmark: it keeps every round's updates and global tensors, to be looked at after."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from fleetune.server.aggregator import Aggregator
from fleetune.tools.bench.chaos.process import ChaosSpec, bend_clock
from fleetune.tools.bench.transfer.noop_server import config_for


def main(path: str) -> None:
    """Lead one job to its end."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d %(levelname)s %(message)s")
    spec = msgspec.json.decode(Path(path).read_bytes(), type=ChaosSpec)
    bend_clock(spec.clock)
    # A run has too few rounds to come to a checkpoint by itself.
    config = replace(config_for(spec, keep_history=True), checkpoint_rounds=spec.checkpoint_rounds)
    Aggregator(config).run()


if __name__ == "__main__":
    main(sys.argv[1])
