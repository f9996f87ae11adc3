"""Training and evaluating an expert on a device's own samples: the part that all methods share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.batch import batch_gradient
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Expert, Factors
from fleetune.edge.engine.optimiser import OPTIMISERS, Optimiser
from fleetune.edge.engine.prefix import CHUNK, ComputedPrefix, Prefix, split
from fleetune.edge.engine.suffix import Suffix
from fleetune.edge.methods.base import Device, Round, Settings
from fleetune.edge.methods.unfinished import Unfinished
from fleetune.edge.protocol.errors import DataError
from fleetune.edge.resources.guard import Verdict

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]


class Learner(Protocol):
    """What a round trains, and how it takes a step."""

    @property
    def expert(self) -> Expert:
        """The adapters of the backbone's blocks."""
        ...

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """All that it trains: full name → tensor."""
        ...

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Go on from tensors as they were once."""
        ...

    def narrow(self, depth: int) -> None:
        """Train no more than the top ``depth`` blocks and what lies above them."""
        ...

    def step(self, run: LocalRun, number: int, batch: Indices) -> float:
        """Take one step on some samples.

        Args:
            run: The suffix as it is now.
            number: Steps of the round before this one.
            batch: Sample numbers.

        Returns:
            Their summed loss.

        Raises:
            DataError: The loss or its gradient is NaN or infinite; nothing has changed.
        """
        ...


class ExpertLearner:
    """Trains one expert: the adapters of the active blocks and the head.

    Args:
        expert: What is trained.
        settings: Hyper-parameters.
        factors: Matrices of the adapters that are trained.
        on_batch: Sees the sample numbers and features of each batch after its optimiser step.
    """

    def __init__(
        self,
        expert: Expert,
        settings: Settings,
        *,
        factors: Factors = "AB",
        on_batch: Callable[[Indices, FloatArray], None] = lambda _indices, _features: None,
    ) -> None:
        self.expert, self._settings, self._factors, self._on_batch = expert, settings, factors, on_batch
        self._gradient = Expert(expert.layout)
        self._optimiser: Optimiser | None = None

    @property
    def tensors(self) -> Mapping[str, FloatArray]:
        """The expert's."""
        return self.expert.tensors

    def load(self, tensors: Mapping[str, FloatArray]) -> None:
        """Go on from an expert as it was once."""
        self.expert.load(tensors)

    def narrow(self, depth: int) -> None:
        """Train no more than the top ``depth`` blocks and the head."""
        self._trained = self.expert.layout.trained(depth, self._factors)
        size = self.expert.vector[self._trained].size
        if self._optimiser is None:
            self._optimiser = optimiser_of(self._settings, size)
        else:
            self._optimiser.narrow(size)

    def step(self, run: LocalRun, number: int, batch: Indices) -> float:
        """Take one step on some samples."""
        expert, gradient = self.expert, self._gradient
        dataset = run.device.dataset

        def descend(some: Indices, micro_batch: int) -> tuple[float, FloatArray]:
            return batch_gradient(run.suffix, run.prefix, dataset.labels, some, micro_batch, expert, gradient)

        def is_sound(some: Indices) -> bool:
            return is_finite(descend(some, len(some))[0], gradient.vector[self._trained])

        loss, features = descend(batch, run.micro_batch)
        if not is_finite(loss, gradient.vector[self._trained]):
            raise diverged(dataset, "the loss", number, batch, is_sound)
        assert self._optimiser is not None
        parameters = expert.vector[self._trained]  # a view of them if they lie together, and else a copy
        self._optimiser.step(parameters, gradient.vector[self._trained])
        expert.vector[self._trained] = parameters
        self._on_batch(batch, features)
        return loss


class LocalRun:
    """One expert's suffix on one device, at the depth that plan and schedule allow.

    Args:
        device: The device.
        settings: Hyper-parameters.
        expert: Its adapters below the active blocks decide which hidden states the suffix starts from.

    Attributes:
        depth: Active blocks at the start of the round.
        active: Active blocks now.
        micro_batch: Samples that go through the blocks at once now.
        prefix: What the suffix starts from.
        suffix: The active blocks.
    """

    def __init__(self, device: Device, settings: Settings, expert: Expert) -> None:
        self.device, self.settings = device, settings
        self.depth = min(device.plan.depth, settings.depth)
        self.active, self.micro_batch = self.depth, device.plan.micro_batch
        self.prefix: Prefix = device.cache.prefix(device.backbone.blocks - self.depth, expert)
        device.backbone.give_back()  # what computing the prefix took
        self.suffix = Suffix(device.backbone, self.depth, recompute=device.plan.recompute)

    def train(self, learner: Learner, announced: Round, rng: np.random.Generator, *, evaluated: int) -> float:
        """Train, in place.

        When memory becomes short, the guard asks for less before a step: what is trained so far is stored, then
        micro-batches become smaller, then the lowest active block is frozen, one after the other; when nothing is left
        to give back, training ends with what it has. A process that is killed nevertheless goes on from there.

        Args:
            learner: What is trained.
            announced: The round, with its guard.
            rng: Order of the samples.
            evaluated: Samples still to be evaluated in this round, for which time is kept back.

        Returns:
            Mean training loss.

        Raises:
            DataError: The loss or its gradient is NaN or infinite; names the step and the samples. What is trained has
                the values before that step; nothing of this round may be kept.
        """
        settings, train = self.settings, self.device.dataset.indices("train")
        unfinished = Unfinished(self.device.store, announced.number)
        begun = unfinished.load(learner)
        learner.narrow(self.active)
        steps = settings.epochs * -(-len(train) // settings.batch)
        total, seen = 0.0, 0
        for step, batch in enumerate(self._batches(train, rng)):
            if step < begun:
                continue
            verdict = announced.guard.before_step(self._seconds(evaluated))
            if verdict is Verdict.EASE:
                unfinished.save(learner, step)
                if not self._ease(learner.expert, announced.guard.wanted_mib):
                    announced.guard.give_up()
                    break
                learner.narrow(self.active)
            elif verdict is Verdict.STOP:
                break
            total += learner.step(self, step, batch)
            seen += len(batch)
            self.device.progress((step + 1) / steps, total / seen)
        return total / max(seen, 1)

    def _seconds(self, evaluated: int) -> tuple[float, float]:
        """Seconds and CPU seconds that evaluating some samples takes."""
        passes = evaluated * (self.active + self.prefix.recomputed)
        return self.device.costs.model.forward_s(passes, self.micro_batch, float(self.device.dataset.lengths.mean()))

    def _ease(self, expert: Expert, wanted_mib: float) -> bool:
        """Do with so much less memory; False if there is nothing to give back."""
        longest, recompute = int(self.device.dataset.lengths.max()), self.suffix.recompute

        def growth() -> float:
            return self.device.costs.model.growth_mib(self.active, self.micro_batch, longest, recompute=recompute)

        before, was = growth(), (self.active, self.micro_batch)
        while before - growth() < wanted_mib:
            if self.micro_batch > 1:
                self.micro_batch //= 2
            elif self.active > 1:
                self.active -= 1
            else:
                break
        if (self.active, self.micro_batch) == was:
            return False
        log.warning(
            "memory is short by %.0f MiB: goes on with micro-batch %d and %d of %d active blocks",
            *(wanted_mib, self.micro_batch, self.active, self.depth),
        )
        backbone = self.device.backbone
        if self.active < was[0]:
            self.prefix = ComputedPrefix(
                *(backbone, self.device.dataset, expert.copy(), backbone.blocks - self.active),
                micro_batch=self.micro_batch,
                below=self.prefix,
            )
        del self.suffix
        self.suffix = Suffix(backbone, self.active, recompute=recompute)
        backbone.give_back()
        return True

    def _batches(self, train: Indices, rng: np.random.Generator) -> Iterator[Indices]:
        for _ in range(self.settings.epochs):
            order = rng.permutation(train)
            for batch in split(order, self.settings.batch):
                # Short samples together: a micro-batch is cut to its longest sample.
                yield batch[np.argsort(self.prefix.lengths[batch], kind="stable")]

    def features(self, expert: Expert, indices: Indices) -> FloatArray:
        """Features [n, d] of some samples under ``expert``.

        Raises:
            DataError: A feature is NaN or infinite; names the samples.
        """
        out = np.empty((len(indices), expert.layout.width), dtype=np.float32)
        order = np.argsort(self.prefix.lengths[indices], kind="stable")
        for chunk in split(order, CHUNK):
            self.device.backbone.pulse()
            rows = split(chunk, self.micro_batch)
            parts = self.prefix.chunk([indices[some] for some in rows])
            for some, features in zip(rows, self.suffix.features(parts, expert), strict=True):
                out[some] = features
        self.device.dataset.check_finite(indices, out, "the feature vector")
        return out


def optimiser_of(settings: Settings, size: int, learning_rate: float | None = None) -> Optimiser:
    """The optimiser that a job asks for, for so many parameters; by default with its learning rate."""
    rate = settings.learning_rate if learning_rate is None else learning_rate
    return OPTIMISERS[settings.optimiser](size, rate, weight_decay=settings.weight_decay)


def is_finite(loss: float, *gradients: FloatArray) -> bool:
    """Whether a step gave numbers: a loss, and gradients whose squares can be summed."""
    return math.isfinite(loss) and all(math.isfinite(np.vdot(gradient, gradient)) for gradient in gradients)


def diverged(dataset: Dataset, what: str, step: int, batch: Indices, is_sound: Callable[[Indices], bool]) -> DataError:
    """The error of a step that gave NaN or infinity; names the few samples that do so alone, or else the whole batch.

    Args:
        dataset: The samples.
        what: What is not finite, for people.
        step: Steps of the round before this one.
        batch: Sample numbers.
        is_sound: Whether the step on some samples is finite.
    """
    wrong = [sample for sample in np.sort(batch) if not is_sound(np.array([sample]))]
    fact = f"{what} is not finite at step {step + 1} of the round"
    if 0 < 2 * len(wrong) < len(batch) or len(wrong) == 1 < len(batch):
        return DataError(
            f"{dataset.where(*wrong)}: {fact}; that of the batch's other {len(batch) - len(wrong)} samples is",
            "check what is unusual there; if nothing is, lower the learning rate",
            public=fact,
        )
    return DataError(
        f"{fact}, for the whole batch ({dataset.where(*np.sort(batch))})",
        "lower the learning rate",
        public=f"{fact}, for the whole batch: lower the learning rate",
    )


def accuracy(logits: FloatArray, labels: Indices) -> float:
    """Share of samples whose largest logit is the label's."""
    return float((logits.argmax(axis=1) == labels).mean())
