"""Adapters trained alone: the same depth, samples and steps as in the federation, and nothing goes up."""

from __future__ import annotations

from fleetune.edge.engine.expert import Expert
from fleetune.edge.methods.base import (
    Device,
    ExpertSettings,
    NothingShared,
    Outcome,
    Round,
    random_for,
    read_settings,
    task_layout,
)
from fleetune.edge.methods.local import ExpertLearner, LocalRun, accuracy

_STATE = "standalone"


class Standalone(NothingShared):
    """One private expert from the job's initial values."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def run(self, announced: Round) -> Outcome:
        """Train one more round, or evaluate; nothing goes up."""
        device, dataset = self._device, self._device.dataset
        settings = read_settings(announced, ExpertSettings)
        expert = Expert.initial(task_layout(device, settings), settings.seed)
        if announced.stage == "prepare":
            device.cache.prefix(max(0, device.backbone.blocks - settings.max_depth), expert)
            return Outcome({"samples": len(dataset.indices("train"))})
        expert.load(device.store.load(_STATE) or {})
        local = LocalRun(device, settings, expert)
        val, test = dataset.indices("val"), dataset.indices("test")
        rng = random_for(device, settings, announced)
        loss = local.train(ExpertLearner(expert, settings), announced, rng, evaluated=len(val) + len(test))
        scores = {
            split: accuracy(expert.logits(local.features(expert, indices)), dataset.labels[indices])
            for split, indices in (("val", val), ("test", test))
        }
        device.store.save(_STATE, expert.tensors)  # after the scores: they refuse what is not finite
        return Outcome({"loss": loss, **scores}, depth=local.depth)
