"""The same mixture in torch, as a worker: its own layers, its autograd, its SGD."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.numpy import load_file
from torch.nn import functional

from fleetune.edge.resources.process import peak_mib
from fleetune.tools.bench.training.mixture_spec import CLASSES, INPUTS, RATE, STEPS, MixtureSpec
from fleetune.tools.pack.extractors import CNNS, SHARED_CNN
from fleetune.tools.pack.torch_networks import TorchCnn, TorchGate, load, parameters_of


def main(spec: MixtureSpec) -> None:
    """Answer requests."""
    torch.set_num_threads(spec.threads)
    tensors = load_file(Path(spec.folder) / "tensors.safetensors")
    body, shared = TorchCnn(CNNS[spec.network]), TorchCnn(SHARED_CNN)
    gate = TorchGate(INPUTS, len(tensors["gate.fc1.bias"]))
    header = torch.nn.Linear(SHARED_CNN.representation, CLASSES)
    parameters = {
        **parameters_of(body, "body."),
        **parameters_of(shared, "extractor."),
        **parameters_of(gate, "gate."),
        **parameters_of(header, "header."),
    }
    load(parameters, tensors)
    pictures, labels = torch.from_numpy(tensors["pictures"]), torch.from_numpy(tensors["labels"])
    optimiser = torch.optim.SGD(parameters.values(), RATE)

    def steps() -> dict[str, Any]:
        loss, start = torch.zeros(()), time.perf_counter()
        for _ in range(STEPS):
            alpha = gate(pictures.flatten(1))
            logits = header(alpha[:, :1] * shared(pictures) + alpha[:, 1:] * body(pictures))
            loss = functional.cross_entropy(logits, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return {"ms": 1000 * (time.perf_counter() - start) / STEPS, "loss": float(loss.detach())}

    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        peak = json.loads(line)["do"] == "peak"
        print(json.dumps({"peak_mib": peak_mib()} if peak else steps()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=MixtureSpec))
