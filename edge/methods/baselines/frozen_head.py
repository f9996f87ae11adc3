"""A linear head on the features of the frozen backbone: the least that a device could do."""

from __future__ import annotations

import numpy as np

from fleetune.edge.engine.dataset import SPLITS
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.loss import cross_entropy
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.prefix import Prefix, split
from fleetune.edge.methods.base import (
    Device,
    ExpertSettings,
    FloatArray,
    Metrics,
    NothingShared,
    Outcome,
    Round,
    read_settings,
    task_layout,
)
from fleetune.edge.methods.local import Indices, accuracy

_STEPS = 200
_LEARNING_RATE = 0.02
_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Strengths of the L2 penalty, from which ``val`` picks one."""


class FrozenHead(NothingShared):
    """Logistic regression with an L2 penalty on standardised features, by full-batch Adam."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, announced: Round) -> Outcome:
        """Train and evaluate the head; nothing goes up."""
        device, dataset = self._device, self._device.dataset
        settings = read_settings(announced, ExpertSettings)
        layout = task_layout(device, settings)
        prefix = device.cache.prefix(device.backbone.blocks, Expert(layout))
        if announced.stage == "prepare":
            return Outcome({"samples": len(dataset.indices("train"))})
        indices = {name: dataset.indices(name) for name in SPLITS}
        features = {name: self._features(prefix, some) for name, some in indices.items()}
        labels = {name: dataset.labels[some] for name, some in indices.items()}
        mean, deviation = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
        scaled = {name: (z - mean) / deviation for name, z in features.items()}
        best: Metrics = {"val": -1.0}
        for number, penalty in enumerate(_PENALTIES, start=1):
            head, loss = _fit(layout, scaled["train"], labels["train"], penalty)
            scores = {name: accuracy(head.logits(scaled[name]), labels[name]) for name in ("val", "test")}
            if scores["val"] > float(best["val"]):
                best = {"loss": loss, **scores}
            device.progress(number / len(_PENALTIES), loss)
        return Outcome(best)

    def _features(self, prefix: Prefix, indices: Indices) -> FloatArray:
        rows = []
        for part in prefix.parts(split(indices, self._device.plan.micro_batch)):
            rows.append(self._device.backbone.pool(*part).copy())  # so that the arena gets its room back
        features = np.concatenate(rows)
        self._device.dataset.check_finite(indices, features, "the feature vector")
        return features


def _fit(layout: Layout, features: FloatArray, labels: Indices, penalty: float) -> tuple[Expert, float]:
    """Train a head from zero; returns it and its mean loss, without the penalty."""
    expert, gradient = Expert(layout), Expert(layout)
    tail = layout.tail(0)
    weight, bias = gradient.tensors["head.weight"], gradient.tensors["head.bias"]
    optimiser, loss = Adam(tail.stop - tail.start, _LEARNING_RATE), 0.0
    for _ in range(_STEPS):
        loss, slope = cross_entropy(expert.logits(features), labels)
        slope /= len(slope)
        weight[...] = features.T @ slope + penalty * expert.tensors["head.weight"]
        bias[...] = slope.sum(axis=0)
        optimiser.step(expert.vector[tail], gradient.vector[tail])
    return expert, loss / len(labels)
