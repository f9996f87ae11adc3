"""Fleetune's engine, as a worker: what a device runs, and nothing else."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.batch import batch_gradient
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.model import ExpertName, Model, card_for
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.predictor import Predictor
from fleetune.edge.engine.prefix import split
from fleetune.edge.engine.suffix import Suffix
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.resources.process import cpu_seconds, peak_mib
from fleetune.tools.bench.spec import Spec


def main(spec: Spec) -> None:
    """Train adapters and a linear head; answer requests."""
    pack = Pack.open(Path(spec.pack))
    dataset = read_dataset(Path(spec.data), pack)
    backbone = Backbone(pack, spec.threads)
    expert = Expert(Layout.of(pack.manifest, spec.classes))
    initial = TensorFile(Path(spec.initial))
    expert.load({name: initial[name] for name in expert.tensors})
    gradient = Expert(expert.layout)
    cache = PrefixCache(Path(spec.cache), backbone, dataset, micro_batch=spec.micro_batch)
    tail = expert.layout.tail(spec.depth)
    optimiser = Adam(tail.stop - tail.start, spec.rate, weight_decay=spec.decay)
    train, suffix, predictors = dataset.indices("train"), None, dict[ExpertName, Predictor]()
    if spec.trains:
        backbone.hold(range(backbone.blocks - spec.depth, backbone.blocks))
        backbone.fused(spec.depth)  # ready means that a step could begin

    def epoch() -> dict[str, Any]:
        nonlocal suffix
        wall, cpu, losses = time.perf_counter(), cpu_seconds(), []
        prefix = cache.prefix(backbone.blocks - spec.depth, expert)  # computed in the first epoch, found in the others
        if suffix is None:
            suffix = Suffix(backbone, spec.depth, recompute=False)
        for batch in split(train, spec.batch):
            loss, _ = batch_gradient(suffix, prefix, dataset.labels, batch, spec.micro_batch, expert, gradient)
            optimiser.step(expert.vector[tail], gradient.vector[tail])
            losses.append(loss / len(batch))
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_s": cpu_seconds() - cpu,
            "loss": float(np.mean(losses)),
        }

    def product() -> dict[str, Any]:
        """The rate of a plain matrix product, GFLOP/s."""
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((1024, 384), dtype=np.float32), rng.standard_normal((384, 1536), dtype=np.float32)
        out, times = np.empty((1024, 1536), dtype=np.float32), []
        for _ in range(30):
            wall = time.perf_counter()
            np.matmul(a, b, out=out)
            times.append(time.perf_counter() - wall)
        return {"gflops": 2 * 1024 * 384 * 1536 / float(np.median(times)) / 1e9}

    def thousand() -> dict[str, Any]:
        """What the resident set grows by from the 50th step to the thousandth, in MiB."""
        assert suffix is not None
        prefix, process, start = cache.prefix(backbone.blocks - spec.depth, expert), psutil.Process(), 0
        for step, batch in enumerate(itertools.islice(itertools.cycle(split(train, spec.batch)), 1000)):
            batch_gradient(suffix, prefix, dataset.labels, batch, spec.micro_batch, expert, gradient)
            optimiser.step(expert.vector[tail], gradient.vector[tail])
            if step == 50:
                start = process.memory_info().rss
        return {"growth_mib": (process.memory_info().rss - start) / 2**20}

    def answer(who: ExpertName) -> dict[str, Any]:
        """Answer every training sample by itself, after a first one that is timed apart."""
        start = time.perf_counter()
        if who not in predictors:
            predictors[who] = Predictor(pack, _model(pack, expert, spec).choose(who)[1], threads=spec.threads)
        predictors[who].samples(dataset, train[:1])
        first, times = time.perf_counter() - start, []
        for index in train:
            start = time.perf_counter()
            predictors[who].samples(dataset, index.reshape(1))
            times.append(time.perf_counter() - start)
        return {"first_s": first, "median_ms": 1000 * float(np.median(times))}

    answers: dict[str, Callable[[], dict[str, Any]]] = {
        "epoch": epoch,
        "peak": lambda: {"peak_mib": peak_mib()},
        "product": product,
        "mixture": lambda: answer("mixture"),
        "one": lambda: answer("global"),
        "thousand": thousand,
    }
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(answers[json.loads(line)["do"]]()), flush=True)  # noqa: T201


def _model(pack: Pack, expert: Expert, spec: Spec) -> Model:
    """A mixture whose local expert differs in the active blocks."""
    local = expert.copy()
    tail = local.layout.tail(spec.depth)
    local.vector[tail] += np.random.default_rng(0).normal(0, 0.01, tail.stop - tail.start)
    card = card_for(
        pack, kind="mixture", job="bench", run="bench", classes=spec.classes, max_depth=spec.depth, mix="logits"
    )
    return Model(card, expert, local, Gate(local.layout.width, pack.manifest.rank, seed=0))


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Spec))
