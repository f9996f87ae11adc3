"""``fleetune bench mixture``: a training step of pFedMoE's mixture of two CNNs, beside the same in torch, in turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from fleetune.edge.engine.parameters import initial
from fleetune.edge.methods.pfedmoe.gate import initial_gate
from fleetune.edge.methods.pfedmoe.mixture import HEADER
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.training.mixture_spec import CLASSES, INPUTS, MixtureSpec
from fleetune.tools.bench.training.workers import REST_S, Worker
from fleetune.tools.pack.extractors import CNNS, SHARED_CNN
from fleetune.tools.pack.mixture import BODY, EXTRACTOR, GATE, network_graphs

TORCH = "torch eager"
PEERS = {"torch": TORCH}
OURS = "Fleetune"

_TIME, _MEMORY = Target(1.2, lower=True), Target(1 / 3, lower=True)


def bench_mixture(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For graphs, initial values and logs.
        quick: One network and few repeats.
        peers: Keys of :data:`PEERS`.
        threads: Threads of every contender.
        say: Is told what happens next.
    """
    figures: list[Figure] = []
    repeats, turns = (1, 3) if quick else (3, 12)
    for network in ("cnn-5",) if quick else ("cnn-1", "cnn-5"):
        for batch in (64,) if quick else (16, 64):
            place = folder / f"{network}-{batch}"
            spec = _prepare(place, network, batch, threads)
            figures += _beside(spec, place, peers, repeats, turns, say)
    return Document("mixture", tuple(figures))


def _prepare(place: Path, network: str, batch: int, threads: int) -> MixtureSpec:
    """Write graphs, initial values and samples: the same for both."""
    place.mkdir(parents=True)
    body, width = CNNS[network], SHARED_CNN.representation
    for stem, graph in network_graphs(body, SHARED_CNN).items():
        write_atomic(place / f"{stem}.onnx", graph.SerializeToString(deterministic=True))
    shapes = {f"{BODY}{name}": shape for name, shape in body.shapes.items()}
    shapes |= {f"{EXTRACTOR}{name}": shape for name, shape in SHARED_CNN.shapes.items()}
    shapes |= dict(zip(HEADER, ((width, CLASSES), (CLASSES,)), strict=True))
    gate = initial_gate(INPUTS, GATE, seed=1)
    rng = np.random.default_rng(0)
    tensors = {
        **initial(shapes, 0).tensors,
        **gate.tensors,
        "pictures": rng.uniform(-1, 1, (batch, 3, 32, 32)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, batch),
    }
    write_atomic(place / "tensors.safetensors", safetensors.numpy.save(tensors))
    return MixtureSpec(str(place), network, batch, threads)


def _beside(
    spec: MixtureSpec, place: Path, peers: Sequence[str], repeats: int, turns: int, say: Callable[[str], None]
) -> list[Figure]:
    modules = {OURS: "mixture_worker", **{PEERS[peer]: "torch_mixture_worker" for peer in peers}}
    file = place / "spec.json"
    write_atomic(file, msgspec.json.encode(spec))
    steps: dict[str, list[float]] = {name: [] for name in modules}
    peaks: dict[str, list[float]] = {name: [] for name in modules}
    losses: dict[str, float] = {}
    for repeat in range(repeats):
        say(f"{spec.network}, batch {spec.batch}: repeat {repeat + 1} of {repeats}")
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(
                    Worker(
                        name,
                        [sys.executable, "-m", f"fleetune.tools.bench.training.{module}", str(file)],
                        place / "log.txt",
                    )
                )
                for name, module in modules.items()
            }
            for _ in range(turns):
                for name, worker in workers.items():
                    time.sleep(REST_S)
                    found = worker.ask("steps")
                    steps[name].append(found["ms"])
                    losses[name] = found["loss"]
            for name, worker in workers.items():
                peaks[name].append(worker.ask("peak")["peak_mib"])
    title = f"{spec.network} and the shared CNN, batch {spec.batch}"
    figures = []
    contenders: list[str | None] = [*(PEERS[peer] for peer in peers)] or [None]
    for peer in contenders:
        theirs = (None, None) if peer is None else (steps[peer], peaks[peer])
        for what, unit, values, other, target in (
            ("a step", "ms", steps[OURS], theirs[0], _TIME),
            ("peak memory", "MiB", peaks[OURS], theirs[1], _MEMORY),
        ):
            asked = target if peer else None
            figures.append(figure(f"{title}: {what}", unit, values, peer=peer, peer_values=other, target=asked))
        if peer is not None:
            name, ours = f"{title}: loss of the last step", [losses[OURS]]
            figures.append(figure(name, "nats", ours, peer=peer, peer_values=[losses[peer]]))
    return figures
