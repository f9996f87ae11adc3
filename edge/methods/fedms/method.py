"""FedMS on one device.

Stage ``global``: train the active blocks and the head of the shared expert; they go up.
Stage ``personal``: the shared expert is frozen; train a private expert that starts as its copy, and the gate. Only
the gate's adapter goes up.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.gate import ADAPTER, HEAD, Gate
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.engine.model import Model, card_for
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.prefix import split
from fleetune.edge.methods.base import (
    Count,
    Device,
    ExpertSettings,
    FloatArray,
    Metrics,
    Outcome,
    Rate,
    Round,
    SameBackbone,
    random_for,
    read_settings,
    task_layout,
)
from fleetune.edge.methods.local import ExpertLearner, Indices, LocalRun, accuracy, diverged, is_finite
from fleetune.edge.protocol.errors import ModelError
from fleetune.edge.protocol.modelfile import FILE, REMEDY, Mix


class FedMSSettings(ExpertSettings, frozen=True, kw_only=True):
    """Hyper-parameters of FedMS.

    Attributes:
        gate_rank: Rank of the gate adapter.
        gate_learning_rate: Step size of the gate.
        gate_epochs: Passes of the gate over its samples in a round.
        gate_split: Samples that the gate learns from: ``train``, or ``val``, which no expert was trained on.
        mix: Whether experts are mixed at their logits or at their features.
    """

    gate_rank: Count
    gate_learning_rate: Rate
    gate_epochs: Count
    gate_split: Literal["train", "val"]
    mix: Mix


@dataclass(frozen=True)
class _Stage:
    """One round of stage 2: the mixture, and what the frozen expert makes of every sample."""

    run: LocalRun
    settings: FedMSSettings
    mixture: Mixture
    gate_input: FloatArray
    frozen_features: FloatArray

    def experts(self, local_features: FloatArray, indices: Indices) -> FloatArray:
        """What is mixed for some samples."""
        return self.mixture.experts(self.frozen_features[indices], local_features)


class FedMS(SameBackbone):
    """The device's part of FedMS."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._frozen_features: tuple[str, FloatArray] | None = None
        self._gate_inputs: tuple[str, FloatArray] | None = None

    def run(self, announced: Round) -> Outcome:
        """Do one round."""
        settings = read_settings(announced, FedMSSettings)
        shared = Expert.initial(task_layout(self._device, settings), settings.seed)
        shared.add(announced.tensors)
        if announced.stage == "prepare":
            boundary = self._device.backbone.blocks - settings.max_depth
            self._device.cache.prefix(boundary, shared)
            if announced.tensors:
                self._gate_input(boundary, shared)
                self._features_of(shared, LocalRun(self._device, settings, shared))
            return Outcome({"samples": len(self._device.dataset.indices("train"))})
        if announced.stage == "global":
            return self._global(announced, settings, shared)
        return self._personal(announced, settings, shared)

    def _global(self, announced: Round, settings: FedMSSettings, shared: Expert) -> Outcome:
        dataset = self._device.dataset
        start, run = shared.copy(), LocalRun(self._device, settings, shared)
        val, test = dataset.indices("val"), dataset.indices("test")
        scores = {
            part: accuracy(shared.logits(run.features(shared, indices)), dataset.labels[indices])
            for part, indices in (("val", val), ("test", test))
        }
        rng = random_for(self._device, settings, announced)
        loss = run.train(ExpertLearner(shared, settings, factors=settings.factors), announced, rng, evaluated=0)
        metrics: Metrics = {"loss": loss, "val": scores["val"], "test": scores["test"]}
        return Outcome(metrics, shared.gained(start, run.depth, settings.factors), run.depth)

    def _personal(self, announced: Round, settings: FedMSSettings, shared: Expert) -> Outcome:
        device = self._device
        local = shared.copy()
        gate = Gate(shared.layout.width, settings.gate_rank, settings.seed)
        gate.add(announced.tensors)
        shared_part = [name for name in ADAPTER if name[-1] in settings.factors]
        start = {name: gate.tensors[name].copy() for name in shared_part}
        file = device.store.folder / FILE
        if file.is_file():
            kept = Model.read(file, device.backbone.pack).mixture
            if kept is None:
                raise ModelError(f"{file} holds no local expert", REMEDY)
            local.load(kept.local.tensors)
            gate.load({name: kept.gate.tensors[name] for name in HEAD})
        boundary = device.backbone.blocks - settings.max_depth
        mixture = Mixture(shared, local, gate, boundary, settings.mix)
        gate_input = self._gate_input(boundary, shared)  # first: its prefix may take the room of the run's
        run = LocalRun(device, settings, shared)
        stage = _Stage(run, settings, mixture, gate_input, self._features_of(shared, run))
        trains = announced.stage == "personal"
        loss = self._train(announced, stage) if trains else None
        metrics = self._scores(stage)
        self._keep(settings, mixture)  # after the scores: they refuse what is not finite, and what was stored stays
        if loss is not None:
            metrics["loss"] = loss
        tensors = {name: gate.tensors[name] - start[name] for name in shared_part} if trains else {}
        return Outcome(metrics, tensors, run.depth)

    def _keep(self, settings: FedMSSettings, mixture: Mixture) -> None:
        """Write the model file: what this device goes on from, and what its owner takes home."""
        store = self._device.store
        card = card_for(
            self._device.backbone.pack,
            kind="mixture",
            job=store.job,
            run=store.run,
            classes=settings.classes,
            max_depth=settings.max_depth,
            mix=settings.mix,
        )
        Model(card, mixture.global_, mixture.local, mixture.gate).write(store.folder / FILE)

    def _features_of(self, shared: Expert, run: LocalRun) -> FloatArray:
        """The frozen expert's features of every sample, computed once."""
        key = f"{run.depth} {shared.fingerprint_below(shared.layout.blocks)}"
        if self._frozen_features is None or self._frozen_features[0] != key:
            everything = np.arange(len(self._device.dataset))
            self._frozen_features = (key, run.features(shared, everything))
        return self._frozen_features[1]

    def _gate_input(self, boundary: int, shared: Expert) -> FloatArray:
        """The mean hidden state of every sample at the job's boundary, kept once it is known."""
        key = f"{boundary} {shared.fingerprint_below(boundary)}"
        if self._gate_inputs is None or self._gate_inputs[0] != key:
            self._gate_inputs = (key, self._device.cache.prefix(boundary, shared).pooled)
        return self._gate_inputs[1]

    def _train(self, announced: Round, stage: _Stage) -> float:
        device, settings, mixture = self._device, stage.settings, stage.mixture
        dataset, gate = device.dataset, mixture.gate
        rng = random_for(device, settings, announced)
        trained = {name: t for name, t in gate.tensors.items() if name in HEAD or name[-1] in settings.factors}
        optimisers = {name: Adam(tensor.size, settings.gate_learning_rate) for name, tensor in trained.items()}
        steps = itertools.count()

        def gradients(indices: Indices, local_features: FloatArray) -> tuple[float, dict[str, FloatArray]]:
            experts = stage.experts(local_features, indices)
            return gate.gradients(stage.gate_input[indices], experts, dataset.labels[indices], mixture.head)

        def step(indices: Indices, local_features: FloatArray) -> None:
            def is_sound(one: Indices) -> bool:
                loss, found = gradients(one, local_features[np.isin(indices, one)])
                return is_finite(loss, *found.values())

            loss, found = gradients(indices, local_features)
            number = next(steps)
            if not is_finite(loss, *found.values()):
                raise diverged(dataset, "the gate's loss", number, indices, is_sound)
            for name, tensor in trained.items():
                optimisers[name].step(tensor.reshape(-1), found[name].reshape(-1))

        evaluated = len(dataset.indices("val")) + len(dataset.indices("test"))
        if settings.gate_split == "train":
            learner = ExpertLearner(mixture.local, settings, on_batch=step)
            return stage.run.train(learner, announced, rng, evaluated=evaluated)
        loss = stage.run.train(ExpertLearner(mixture.local, settings), announced, rng, evaluated=evaluated)
        held_out = dataset.indices("val")
        features = stage.run.features(mixture.local, held_out)
        for _ in range(settings.gate_epochs):
            for some in split(rng.permutation(len(held_out)), settings.batch):
                step(held_out[some], features[some])
        return loss

    def _scores(self, stage: _Stage) -> Metrics:
        """Accuracy of each expert and of the mixture on the device's test samples, and of the mixture on ``val``."""
        mixture, dataset = stage.mixture, self._device.dataset
        metrics: Metrics = {}
        for part in ("val", "test"):
            indices = dataset.indices(part)
            labels = dataset.labels[indices]
            features = stage.run.features(mixture.local, indices)
            weights = mixture.gate.weights(stage.gate_input[indices])
            dataset.check_finite(indices, weights, "the gate's weight")
            scores = {
                "global": accuracy(mixture.global_.logits(stage.frozen_features[indices]), labels),
                "local": accuracy(mixture.local.logits(features), labels),
                "mixture": accuracy(mixture.logits(weights, stage.experts(features, indices)), labels),
            }
            if part == "val":
                metrics["val"] = scores["mixture"]
            else:
                metrics |= {f"test_{name}": score for name, score in scores.items()}
                metrics["test"] = scores["mixture"]
                metrics["gate_local"] = float(weights[:, 1].mean())
        return metrics
