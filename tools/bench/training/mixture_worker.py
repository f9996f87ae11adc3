"""Fleetune's mixture of two CNNs, as a worker: what a device runs, and nothing else."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.optimiser import Sgd
from fleetune.edge.engine.parameters import Parameters
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.methods.pfedmoe.body import NetworkBody
from fleetune.edge.methods.pfedmoe.extractor import Extractor
from fleetune.edge.methods.pfedmoe.gate import SampleGate
from fleetune.edge.methods.pfedmoe.mixture import HEADER, Mixture
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.resources.process import peak_mib
from fleetune.tools.bench.training.mixture_spec import INPUTS, RATE, STEPS, MixtureSpec

Indices = NDArray[np.int64]


class Trainer:
    """Trains the mixture on one batch."""

    def __init__(self, spec: MixtureSpec) -> None:
        folder = Path(spec.folder)
        file, sessions = TensorFile(folder / "tensors.safetensors"), Sessions(folder, spec.threads)
        tensors = {name: file[name] for name in file}
        self._pictures, self._labels = tensors["pictures"], np.array(tensors["labels"])

        def part(prefix: str) -> Parameters:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            found = Parameters({name: tensor.shape for name, tensor in own.items()})
            found.load(own)
            return found

        header = part("header.")
        width = header.tensors[HEADER[0]].shape[0]
        gate = SampleGate(sessions, INPUTS, tensors["gate.fc1.bias"].size, width, seed=0)
        gate.load({name: tensor for name, tensor in tensors.items() if name.startswith("gate.")})
        body, extractor = (
            NetworkBody(sessions, part("body."), self),
            Extractor(sessions, part("extractor."), self, chunk=spec.batch),
        )
        self._mixture = Mixture(extractor, body, header, gate, self.flat)
        self._steps = [
            (learned.vector, gradient.vector, Sgd(learned.vector.size, RATE, momentum=0.0))
            for learned, gradient in self._mixture.parts
        ]

    def __call__(self, indices: Indices) -> Mapping[str, NDArray[np.float32]]:
        """What both networks see of some samples."""
        return {"sample": self._pictures[indices]}

    def flat(self, indices: Indices) -> NDArray[np.float32]:
        """What the gate sees of them."""
        return self._pictures[indices].reshape(len(indices), INPUTS)

    def steps(self) -> dict[str, Any]:
        """A few steps: milliseconds of one, and the loss before the last."""
        batch, loss, start = np.arange(len(self._labels)), 0.0, time.perf_counter()
        for _ in range(STEPS):
            loss = self._mixture.gradient(batch, self._labels)
            for vector, gradient, optimiser in self._steps:
                optimiser.step(vector, gradient)
        return {"ms": 1000 * (time.perf_counter() - start) / STEPS, "loss": loss / len(batch)}


def main(spec: MixtureSpec) -> None:
    """Answer requests."""
    trainer = Trainer(spec)
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        peak = json.loads(line)["do"] == "peak"
        print(json.dumps({"peak_mib": peak_mib()} if peak else trainer.steps()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=MixtureSpec))
