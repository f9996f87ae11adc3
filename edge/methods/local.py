"""Training and evaluating an expert on a device's own samples: the part that all methods share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.batch import batch_gradient
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.expert import Expert, Factors
from fleetune.edge.engine.optimiser import OPTIMISERS
from fleetune.edge.engine.prefix import CHUNK, ComputedPrefix, Prefix, split
from fleetune.edge.engine.suffix import Suffix
from fleetune.edge.methods.base import Device, Round, Settings
from fleetune.edge.methods.unfinished import Unfinished
from fleetune.edge.protocol.errors import DataError
from fleetune.edge.resources.guard import Verdict

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]


class LocalRun:
    """One expert's suffix on one device, at the depth that plan and schedule allow.

    Args:
        device: The device.
        settings: Hyper-parameters.
        expert: Its adapters below the active blocks decide which hidden states the suffix starts from.
    """

    def __init__(self, device: Device, settings: Settings, expert: Expert) -> None:
        self.device, self.settings = device, settings
        self.depth = min(device.plan.depth, settings.depth)
        self._active, self._micro_batch = self.depth, device.plan.micro_batch
        self.prefix: Prefix = device.cache.prefix(device.backbone.blocks - self.depth, expert)
        device.backbone.give_back()  # what computing the prefix took
        self.suffix = Suffix(device.backbone, self.depth, recompute=device.plan.recompute)

    def train(
        self,
        expert: Expert,
        announced: Round,
        rng: np.random.Generator,
        *,
        evaluated: int,
        factors: Factors = "AB",
        on_batch: Callable[[Indices, FloatArray], None] = lambda _indices, _features: None,
    ) -> float:
        """Train the active blocks and the head in place.

        When memory becomes short, the guard asks for less before a step: what is trained so far is stored, then
        micro-batches become smaller, then the lowest active block is frozen, one after the other; when nothing is left
        to give back, training ends with what it has. A process that is killed nevertheless goes on from there.

        Args:
            expert: What is trained.
            announced: The round, with its guard.
            rng: Order of the samples.
            evaluated: Samples still to be evaluated in this round, for which time is kept back.
            factors: Matrices of the adapters that are trained.
            on_batch: Sees the sample numbers and features of each batch after its optimiser step.

        Returns:
            Mean training loss.

        Raises:
            DataError: The loss or its gradient is NaN or infinite; names the step and the samples. ``expert`` holds
                the values before that step; nothing of this round may be kept.
        """
        settings, dataset = self.settings, self.device.dataset
        train = dataset.indices("train")
        trained = expert.layout.trained(self._active, factors)
        optimiser = OPTIMISERS[settings.optimiser](
            expert.vector[trained].size, settings.learning_rate, weight_decay=settings.weight_decay
        )
        gradient = Expert(expert.layout)
        unfinished = Unfinished(self.device.store, announced.number)
        begun = unfinished.load(expert)
        steps = settings.epochs * -(-len(train) // settings.batch)
        total, seen = 0.0, 0
        for step, batch in enumerate(self._batches(train, rng)):
            if step < begun:
                continue
            verdict = announced.guard.before_step(self._seconds(evaluated))
            if verdict is Verdict.EASE:
                unfinished.save(expert, step)
                if not self._ease(expert, announced.guard.wanted_mib):
                    announced.guard.give_up()
                    break
                trained = expert.layout.trained(self._active, factors)
                optimiser.narrow(expert.vector[trained].size)
            elif verdict is Verdict.STOP:
                break
            loss, features = batch_gradient(
                self.suffix, self.prefix, dataset.labels, batch, self._micro_batch, expert, gradient
            )
            if not is_finite(loss, gradient.vector[trained]):
                raise diverged(dataset, "the loss", step, batch, lambda one: self._is_sound(one, expert))
            parameters = expert.vector[trained]  # a view of them if they lie together, and else a copy
            optimiser.step(parameters, gradient.vector[trained])
            expert.vector[trained] = parameters
            on_batch(batch, features)
            total += loss
            seen += len(batch)
            self.device.progress((step + 1) / steps, total / seen)
        return total / max(seen, 1)

    def _seconds(self, evaluated: int) -> tuple[float, float]:
        """Seconds and CPU seconds that evaluating some samples takes."""
        passes = evaluated * (self._active + self.prefix.recomputed)
        return self.device.costs.forward_s(passes, self._micro_batch, float(self.device.dataset.lengths.mean()))

    def _ease(self, expert: Expert, wanted_mib: float) -> bool:
        """Do with so much less memory; False if there is nothing to give back."""
        longest, recompute = int(self.device.dataset.lengths.max()), self.suffix.recompute

        def growth() -> float:
            return self.device.costs.growth_mib(self._active, self._micro_batch, longest, recompute=recompute)

        before, was = growth(), (self._active, self._micro_batch)
        while before - growth() < wanted_mib:
            if self._micro_batch > 1:
                self._micro_batch //= 2
            elif self._active > 1:
                self._active -= 1
            else:
                break
        if (self._active, self._micro_batch) == was:
            return False
        log.warning(
            "memory is short by %.0f MiB: goes on with micro-batch %d and %d of %d active blocks",
            *(wanted_mib, self._micro_batch, self._active, self.depth),
        )
        backbone = self.device.backbone
        if self._active < was[0]:
            self.prefix = ComputedPrefix(
                *(backbone, self.device.dataset, expert.copy(), backbone.blocks - self._active),
                micro_batch=self._micro_batch,
                below=self.prefix,
            )
        del self.suffix
        self.suffix = Suffix(backbone, self._active, recompute=recompute)
        backbone.give_back()
        return True

    def _is_sound(self, batch: Indices, expert: Expert) -> bool:
        gradient = Expert(expert.layout)
        loss, _ = batch_gradient(
            self.suffix, self.prefix, self.device.dataset.labels, batch, len(batch), expert, gradient
        )
        return is_finite(loss, gradient.vector)

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
            rows = split(chunk, self._micro_batch)
            parts = self.prefix.chunk([indices[some] for some in rows])
            for some, features in zip(rows, self.suffix.features(parts, expert), strict=True):
                out[some] = features
        self.device.dataset.check_finite(indices, out, "the feature vector")
        return out


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
