"""Updates of a round as a rule gets them: records, and tensors that it may read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.messages import UpdateManifest
from fleetune.server.job import RuleSettings
from fleetune.server.journal import Accepted, Typical
from fleetune.server.rules import RULES
from fleetune.server.rules.base import Bounds, norm_of

Tensors = dict[str, NDArray[np.float32]]
FAR = RuleSettings(clip=1e9, weight=1e9)
"""Bounds that nobody reaches."""


@dataclass(frozen=True)
class Sent:
    """An update."""

    tensors: Tensors
    samples: int = 1
    staleness: int = 0


@dataclass
class Round:
    """Updates that are in a journal."""

    updates: Sequence[Sent]
    reads: int = field(default=0, init=False)

    def records(self) -> list[Accepted]:
        return [
            Accepted(
                UpdateManifest(
                    fleet="lab", device=f"d{place}", update="u", run="r", job="fedms", version=5 - sent.staleness,
                    issued=0.0, backbone="b", samples=sent.samples, metrics={},
                ),
                1e9, into=5, staleness=sent.staleness, norm=norm_of(sent.tensors), start=place,
            )
            for place, sent in enumerate(self.updates)
        ]  # fmt: skip

    def load(self, accepted: Accepted) -> Tensors:
        self.reads += 1
        return self.updates[accepted.start].tensors

    def gain(self, settings: RuleSettings, typical: Typical | None = None) -> Tensors:
        """What a rule makes of them."""
        rule = RULES[settings.name](Bounds(settings, typical), self.load)
        for accepted, sent in zip(self.records(), self.updates, strict=True):
            rule.add(accepted, sent.tensors)
        return rule.gain()


def tensors(rng: np.random.Generator, names: Mapping[str, tuple[int, ...]] | Sequence[str], **options: Any) -> Tensors:
    """Random ones."""
    shapes = names if isinstance(names, Mapping) else dict.fromkeys(names, (3, 5))
    return {name: rng.normal(size=shape, **options).astype(np.float32) for name, shape in sorted(shapes.items())}
