"""Fleetune's engine, as a worker: what a device runs, and nothing else."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

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
from fleetune.tools.bench.training.spec import Spec


class Trainer:
    """Trains adapters and a linear head.

    Args:
        spec: What to train.
        profile: A folder for ONNX Runtime's record of where the time goes.
    """

    def __init__(self, spec: Spec, *, profile: Path | None = None) -> None:
        self._spec, pack = spec, Pack.open(Path(spec.pack))
        self._dataset = read_dataset(Path(spec.data), pack)
        self._train = self._dataset.indices("train")
        self._backbone = Backbone(pack, spec.threads, profile=profile)
        self._expert = _initial(pack, spec)
        self._gradient = Expert(self._expert.layout)
        self._cache = PrefixCache(Path(spec.cache), self._backbone, self._dataset, micro_batch=spec.micro_batch)
        self._tail = self._expert.layout.tail(spec.depth)
        self._optimiser = Adam(self._tail.stop - self._tail.start, spec.rate, weight_decay=spec.decay)
        self._suffix: Suffix | None = None
        self._backbone.hold(range(self._backbone.blocks - spec.depth, self._backbone.blocks))
        self._backbone.fused(spec.depth)  # ready means that a step could begin

    def _steps(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[float]:
        """Train on some batches; the mean loss of each."""
        prefix = self._cache.prefix(self._backbone.blocks - self._spec.depth, self._expert)
        if self._suffix is None:
            self._suffix = Suffix(self._backbone, self._spec.depth, recompute=False)
        expert, gradient, labels = self._expert, self._gradient, self._dataset.labels
        for batch in batches:
            loss, _ = batch_gradient(self._suffix, prefix, labels, batch, self._spec.micro_batch, expert, gradient)
            self._optimiser.step(expert.vector[self._tail], gradient.vector[self._tail])
            yield loss / len(batch)

    def epoch(self) -> dict[str, Any]:
        """An epoch; the first one computes the prefix, the others find it."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        losses = list(self._steps(split(self._train, self._spec.batch)))
        seconds, cpu_s = time.perf_counter() - wall, cpu_seconds() - cpu
        return {"seconds": seconds, "cpu_s": cpu_s, "loss": float(np.mean(losses))}

    def thousand(self) -> dict[str, Any]:
        """What the resident set grows by from the 50th step to the thousandth, in MiB."""
        batches, start = itertools.cycle(split(self._train, self._spec.batch)), 0
        for step, _ in enumerate(self._steps(itertools.islice(batches, 1000))):
            if step == 50:
                start = psutil.Process().memory_info().rss
        return {"growth_mib": (psutil.Process().memory_info().rss - start) / 2**20}

    def kinds(self, epochs: int) -> dict[str, float]:
        """Kind of operation → milliseconds of a step."""
        for _ in range(epochs):
            self.epoch()
        (file,) = (file for file in self._backbone.sessions.profiles() if file.name.startswith("suffix"))
        spent: Counter[str] = Counter()
        for event in json.loads(file.read_bytes()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                spent[_KINDS.get(event["args"]["op_name"], "element-wise")] += event["dur"]
        steps = epochs * -(-len(self._train) // self._spec.batch)
        return {kind: spent[kind] / 1000 / steps for kind in dict.fromkeys([*_KINDS.values(), "element-wise"])}


_KINDS = {
    **dict.fromkeys(("Gemm", "FusedGemm"), "products with weights"),
    **dict.fromkeys(("MatMul", "FusedMatMul"), "products of attention"),
    **dict.fromkeys(("Transpose", "Reshape", "Concat", "Shape", "Unsqueeze"), "transposes and shapes"),
    **dict.fromkeys(("LayerNormalization", "Softmax", "ReduceMean", "ReduceSum"), "normalisations, softmax and sums"),
}
"""Operator of ONNX → what it is for."""


class Answerer:
    """Answers one sample at a time."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._pack = spec, Pack.open(Path(spec.pack))
        self._dataset = read_dataset(Path(spec.data), self._pack)
        self._model = _model(self._pack, _initial(self._pack, spec), spec)
        self._train = self._dataset.indices("train")

    def answer(self, who: ExpertName) -> dict[str, Any]:
        """Answer every training sample by itself, after a first one that is timed apart."""
        start = time.perf_counter()
        predictor = self._warm(who)
        first = time.perf_counter() - start
        times = [self._one_ms(predictor, index) for index in self._train]
        return {"first_s": first, "median_ms": float(np.median(times))}

    def both(self) -> dict[str, Any]:
        """The same with the mixture and with one expert, in turns: median milliseconds of each."""
        names: tuple[ExpertName, ...] = ("mixture", "global")
        predictors = [self._warm(who) for who in names]
        times = [[self._one_ms(predictor, index) for predictor in predictors] for index in self._train]
        return dict(zip(names, np.median(times, axis=0).tolist(), strict=True))

    def _warm(self, who: ExpertName) -> Predictor:
        predictor = Predictor(self._pack, self._model.choose(who)[1], threads=self._spec.threads)
        predictor.samples(self._dataset, self._train[:1])
        return predictor

    def _one_ms(self, predictor: Predictor, index: np.int64) -> float:
        start = time.perf_counter()
        predictor.samples(self._dataset, index.reshape(1))
        return 1000 * (time.perf_counter() - start)


def _where(spec: Spec) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"ms": Trainer(spec, profile=Path(folder)).kinds(epochs=3)}


def main(spec: Spec) -> None:
    """Answer requests."""
    answers: dict[str, Callable[[], dict[str, Any]]] = {"peak": lambda: {"peak_mib": peak_mib()}}
    if spec.trains:
        trainer = Trainer(spec)
        answers |= {"epoch": trainer.epoch, "thousand": trainer.thousand, "where": lambda: _where(spec)}
    else:
        answerer = Answerer(spec)
        answers |= {"mixture": lambda: answerer.answer("mixture"), "one": lambda: answerer.answer("global")}
        answers["both"] = answerer.both
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(answers[json.loads(line)["do"]]()), flush=True)  # noqa: T201


def _initial(pack: Pack, spec: Spec) -> Expert:
    expert = Expert(Layout.of(pack.manifest, spec.classes))
    initial = TensorFile(Path(spec.initial))
    expert.load({name: initial[name] for name in expert.tensors})
    return expert


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
