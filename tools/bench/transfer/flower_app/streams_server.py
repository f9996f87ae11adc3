"""Rounds of FedAvg that train nothing, on gRPC streams of Flower's older interface: run by Flower's interpreter."""

import json
import sys
import time
from pathlib import Path

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg


class Timed(FedAvg):  # type: ignore[misc]
    """Writes a line at each round's end: seconds of the monotonic clock."""

    def __init__(self, devices: int, tensors: str, ends: Path) -> None:
        with np.load(tensors) as file:
            initial = ndarrays_to_parameters(list(file.values()))
        super().__init__(
            fraction_evaluate=0.0,
            min_fit_clients=devices,
            min_available_clients=devices,
            initial_parameters=initial,
            accept_failures=False,
        )
        self._devices, self._ends = devices, ends

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        """Average, as ever; a device that failed ends the run."""
        if failures or len(results) < self._devices:
            raise RuntimeError(f"{len(results)} of {self._devices} devices answered: {failures[:1]}")
        averaged = super().aggregate_fit(server_round, results, failures)
        with self._ends.open("a", encoding="utf-8") as file:
            file.write(f"{time.monotonic()}\n")
        return averaged


def main(spec: dict) -> None:  # type: ignore[type-arg]
    """Serve the rounds."""
    start_server(
        server_address=spec["address"],
        config=ServerConfig(num_rounds=spec["rounds"]),
        strategy=Timed(spec["devices"], spec["tensors"], Path(spec["ends"])),
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
