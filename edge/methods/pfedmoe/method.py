"""pFedMoE on one device of a fleet whose devices have different backbones.

Stage ``train``: the shared extractor, the adapters of the backbone's active blocks, the map of its features to the
representation, the header and the gate are trained together. Only the extractor goes up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.model import card_for
from fleetune.edge.engine.optimiser import Optimiser
from fleetune.edge.engine.parameters import initial, views
from fleetune.edge.engine.prefix import split
from fleetune.edge.methods.base import (
    Count,
    Device,
    FloatArray,
    Metrics,
    Outcome,
    Rate,
    Round,
    Settings,
    check_labels,
    random_for,
    read_settings,
)
from fleetune.edge.methods.local import Indices, LocalRun, accuracy, diverged, is_finite, optimiser_of
from fleetune.edge.methods.pfedmoe.body import BackboneBody
from fleetune.edge.methods.pfedmoe.extractor import Extractor, Samples, samples_of
from fleetune.edge.methods.pfedmoe.gate import gate_of
from fleetune.edge.methods.pfedmoe.mixture import HEADER, Mixture
from fleetune.edge.methods.pfedmoe.model import SharedModel
from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import PackError
from fleetune.edge.protocol.messages import Announcement
from fleetune.edge.protocol.modelfile import FILE, GateKind


class PFedMoESettings(Settings, frozen=True, kw_only=True):
    """Hyper-parameters of pFedMoE.

    Attributes:
        representation: Width of the representations; the agent has compared it with its pack.
        shared_learning_rate: Step size of the shared extractor; ``learning_rate`` is that of the private model.
        gate_learning_rate: Step size of the gate.
        gate: ``sample``: a network weighs both representations for each sample; ``element``: each element has one
            trained weight; ``fixed``: one half each.
        gate_split: Samples that the gate learns from: ``train``, or ``val``, which nothing else learns from.
        gate_epochs: Passes over them in a round where they are ``val``.
    """

    representation: Count
    shared_learning_rate: Rate
    gate_learning_rate: Rate
    gate: GateKind
    gate_split: Literal["train", "val"]
    gate_epochs: Count


class MixtureLearner:
    """Trains a mixture; each of its three parts has its learning rate.

    Args:
        mixture: What is trained.
        settings: Hyper-parameters.
        labels: Class of each sample.
    """

    def __init__(self, mixture: Mixture, settings: PFedMoESettings, labels: Indices) -> None:
        self.mixture, self._settings, self._labels = mixture, settings, labels
        gate = mixture.gate
        self._gate = optimiser_of(settings, gate.learned.vector.size, settings.gate_learning_rate)
        self._whole: list[tuple[FloatArray, FloatArray, Optimiser]] = [
            (part.vector, gradient.vector, optimiser_of(settings, part.vector.size, rate))
            for part, gradient, rate in (
                (mixture.extractor.learned, mixture.extractor.gradient, settings.shared_learning_rate),
                (mixture.header, mixture.header_gradient, settings.learning_rate),
            )
        ]
        self._body: Optimiser | None = None

    @property
    def expert(self) -> Expert:
        """The private model's adapters."""
        assert isinstance(self.mixture.body.learned, Expert)
        return self.mixture.body.learned

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """The whole mixture's."""
        return self.mixture.tensors

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Go on from a mixture as it was once."""
        self.mixture.load(tensors)

    def narrow(self, depth: int) -> None:
        """Train no more than the top ``depth`` blocks of the private model."""
        self._tail = self.expert.layout.tail(depth)
        size = self.expert.vector[self._tail].size
        if self._body is None:
            self._body = optimiser_of(self._settings, size)
        else:
            self._body.narrow(size)

    def step(self, run: LocalRun, number: int, batch: Indices) -> float:
        """Take one step on some samples."""
        loss = self.mixture.gradient(batch, self._labels[batch])
        body = self.mixture.body
        tail = body.learned.vector[self._tail], body.gradient.vector[self._tail]
        gradients = [gradient for _, gradient, _ in self._whole]
        if not is_finite(loss, *gradients, tail[1], self.mixture.gate.gradient.vector):
            raise diverged(run.device.dataset, "the loss", number, batch, self._is_sound)
        for vector, gradient, optimiser in self._whole:
            optimiser.step(vector, gradient)
        assert self._body is not None
        self._body.step(*tail)
        if self._settings.gate_split == "train":
            self._gate.step(self.mixture.gate.learned.vector, self.mixture.gate.gradient.vector)
        return loss

    def step_gate(self, dataset: Dataset, batch: Indices) -> None:
        """Take one step of the gate alone.

        Raises:
            DataError: The loss or its gradient is NaN or infinite; nothing has changed.
        """
        gate = self.mixture.gate

        def is_sound(some: Indices) -> bool:
            return is_finite(self.mixture.gate_gradient(some, self._labels[some]), gate.gradient.vector)

        if not is_sound(batch):
            raise diverged(dataset, "the gate's loss", 0, batch, is_sound)
        self._gate.step(gate.learned.vector, gate.gradient.vector)

    def _is_sound(self, batch: Indices) -> bool:
        loss = self.mixture.gradient(batch, self._labels[batch])
        return is_finite(loss, self.mixture.extractor.gradient.vector, self.mixture.body.gradient.vector)


class PFedMoE:
    """The device's part of pFedMoE."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._samples: Samples | None = None

    @classmethod
    def check_fit(cls, pack: Pack, announced: Announcement) -> None:
        """See that the pack has the extractor that this job shares; backbones may differ.

        Raises:
            PackError: It has none, or another one.
        """
        own = pack.manifest.extractor
        if own is None:
            raise PackError(
                f"the job {announced.job} shares an extractor, the pack {pack.path} has none",
                "write the pack again, with `fleetune pack --extractor`",
            )
        width = announced.settings.get("representation")
        if width != own.representation:
            raise PackError(
                f"the job {announced.job} shares representations of width {width}, those of the pack {pack.path} "
                f"have {own.representation}",
                "write all packs of a fleet with the same version of Fleetune",
            )
        if announced.backbone != own.sha256:
            raise PackError(
                f"the job {announced.job} shares the extractor {announced.backbone}, the pack {pack.path} has "
                f"{own.sha256}",
                "write all packs of a fleet from backbones with the same vocabulary and token table",
            )

    @classmethod
    def shapes(cls, manifest: Manifest, settings: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
        """The extractor's tensors: nothing else is shared."""
        del settings
        assert manifest.extractor is not None
        return manifest.extractor.shapes

    def run(self, announced: Round) -> Outcome:
        """Do one round."""
        device = self._device
        settings = read_settings(announced, PFedMoESettings)
        manifest = device.backbone.pack.manifest
        assert manifest.extractor is not None
        check_labels(device, settings)
        expert = Expert.initial(Layout.of(manifest, manifest.extractor.representation), settings.seed)
        boundary = max(0, manifest.blocks - settings.max_depth)
        gate_input = device.cache.prefix(boundary, expert).pooled
        if announced.stage == "prepare":
            return Outcome({"samples": len(device.dataset.indices("train"))})
        run = LocalRun(device, settings, expert)
        mixture = self._mixture(settings, run, expert, gate_input)
        self._resume(mixture)
        shared = mixture.extractor.learned
        shared.add(announced.tensors)
        start = shared.vector.copy()
        loss = self._train(announced, settings, run, mixture)
        metrics = {"loss": loss, **self._scores(mixture)}
        self._keep(settings, mixture, boundary)  # after the scores: they refuse what is not finite
        return Outcome(metrics, views(shared.vector - start, shared.shapes), run.depth)

    def _mixture(self, settings: PFedMoESettings, run: LocalRun, expert: Expert, gate_input: FloatArray) -> Mixture:
        """The device's mixture as it begins."""
        backbone, shared = self._device.backbone, self._device.backbone.pack.manifest.extractor
        assert shared is not None
        if self._samples is None:
            self._samples = samples_of(self._device.dataset, backbone)
        width = shared.representation
        header = dict(zip(HEADER, ((width, settings.classes), (settings.classes,)), strict=True))
        extractor = initial(shared.shapes, settings.seed, what="the extractor")
        return Mixture(
            Extractor(backbone.sessions, extractor, self._samples, chunk=run.micro_batch),
            BackboneBody(run, expert),
            initial(header, settings.seed, what="the header"),
            gate_of(settings.gate, backbone.sessions, gate_input.shape[1], shared.gate, width, seed=settings.seed),
            gate_input.__getitem__,
        )

    def _resume(self, mixture: Mixture) -> None:
        """Go on from the model file, if there is one."""
        file, backbone = self._device.store.folder / FILE, self._device.backbone
        if file.is_file():
            kept = SharedModel.read(file, backbone.pack, backbone.sessions)
            mixture.load({**kept.expert.tensors, **kept.header.tensors, **kept.gate.tensors})

    def _keep(self, settings: PFedMoESettings, mixture: Mixture, boundary: int) -> None:
        """Write the model file: what this device goes on from, and what its owner takes home."""
        store, pack = self._device.store, self._device.backbone.pack
        card = card_for(
            pack,
            kind="pfedmoe",
            job=store.job,
            run=store.run,
            classes=settings.classes,
            max_depth=pack.manifest.blocks - boundary,
            mix="features",
            gate=settings.gate,
        )
        expert = mixture.body.learned
        assert isinstance(expert, Expert)
        SharedModel(card, mixture.extractor.learned, expert, mixture.header, mixture.gate).write(store.folder / FILE)

    def _train(self, announced: Round, settings: PFedMoESettings, run: LocalRun, mixture: Mixture) -> float:
        dataset = self._device.dataset
        held_out = dataset.indices("val")
        rng = random_for(self._device, settings, announced)
        learner = MixtureLearner(mixture, settings, dataset.labels)
        evaluated = len(held_out) + len(dataset.indices("test"))
        loss = run.train(learner, announced, rng, evaluated=evaluated)
        if settings.gate_split == "val":
            for _ in range(settings.gate_epochs):
                for some in split(rng.permutation(held_out), settings.batch):
                    learner.step_gate(dataset, some)
        return loss

    def _scores(self, mixture: Mixture) -> Metrics:
        """Accuracy of the mixture and of its parts alone on the test samples, and of the mixture on ``val``."""
        dataset, metrics = self._device.dataset, dict[str, float | int | str | bool]()
        for part in ("val", "test"):
            indices = dataset.indices(part)
            found, labels = mixture.scores(indices), dataset.labels[indices]
            dataset.check_finite(indices, found.mixture, "the mixture's output")
            metrics[part] = accuracy(found.mixture, labels)
            if part == "test":
                metrics |= {
                    "test_global": accuracy(found.shared, labels),
                    "test_local": accuracy(found.private, labels),
                    "test_mixture": metrics["test"],
                    "gate_local": float(found.weights.mean()),
                }
        return metrics
