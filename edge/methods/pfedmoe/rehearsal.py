"""Steps of a mixture on random samples: what a trial measures where a pack has an extractor to share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.parameters import initial
from fleetune.edge.engine.suffix import Part, Suffix
from fleetune.edge.methods.pfedmoe.body import BackboneBody
from fleetune.edge.methods.pfedmoe.extractor import SIDE, Extractor
from fleetune.edge.methods.pfedmoe.gate import SampleGate
from fleetune.edge.methods.pfedmoe.mixture import HEADER, Mixture
from fleetune.edge.pack.manifest import Manifest

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

_CLASSES, _RATE = 2, 1e-4


@dataclass
class OneBatch:
    """One micro-batch that is all samples there are: a run, and its prefix.

    Attributes:
        suffix: The active blocks.
        micro_batch: Its samples.
        part: Hidden states at the boundary, and their mask.
    """

    suffix: Suffix
    micro_batch: int
    part: Part

    @property
    def prefix(self) -> OneBatch:
        """Itself."""
        return self

    def parts(self, _groups: Sequence[Indices]) -> Iterator[Part]:
        """The one part that there is."""
        yield self.part

    def features(self, expert: Expert, _indices: Indices) -> FloatArray:
        """Its features [n, d]."""
        return self.suffix.features([self.part], expert)[0]


@dataclass
class _Rehearsed(OneBatch):
    """It, and what the extractor sees."""

    manifest: Manifest

    def __call__(self, indices: Indices) -> Mapping[str, FloatArray]:
        rng, mask = np.random.default_rng(0), self.part[1]
        if self.manifest.image is not None:
            return {"sample": rng.standard_normal((len(indices), 3, SIDE, SIDE), dtype=np.float32)}
        shape = (len(indices), mask.shape[2], self.manifest.width)
        return {"sample": rng.standard_normal(shape, dtype=np.float32), "mask": mask}


def step_of(suffix: Suffix, micro_batch: int) -> Callable[[Part], None]:
    """A training step of a mixture: from hidden states and their mask at the boundary.

    Args:
        suffix: The active blocks of the private model.
        micro_batch: Samples of every step.
    """
    backbone, manifest = suffix.backbone, suffix.backbone.pack.manifest
    shared = manifest.extractor
    assert shared is not None
    width = shared.representation
    stand_in = _Rehearsed(suffix, micro_batch, (np.empty(0, np.float32), np.empty(0, np.float32)), manifest)
    body = BackboneBody(stand_in, Expert.initial(Layout.of(manifest, width), 0))
    extractor = Extractor(backbone.sessions, initial(shared.shapes, 0), stand_in, chunk=micro_batch)
    header = initial(dict(zip(HEADER, ((width, _CLASSES), (_CLASSES,)), strict=True)), 0)
    gate = SampleGate(backbone.sessions, manifest.width, shared.gate, width, 0)
    seen = np.random.default_rng(0).standard_normal((micro_batch, manifest.width), dtype=np.float32)
    mixture = Mixture(extractor, body, header, gate, seen.__getitem__)
    trained = [(one.vector, gradient.vector, Adam(one.vector.size, _RATE)) for one, gradient in mixture.parts]
    batch, labels = np.arange(micro_batch), np.zeros(micro_batch, dtype=np.int64)

    def step(part: Part) -> None:
        stand_in.part = part
        mixture.gradient(batch, labels)
        for vector, gradient, optimiser in trained:
            optimiser.step(vector, gradient)

    return step
