"""The private model of a device, less its header: a backbone's active blocks, or a small network trained whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.bound import BoundGraph
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.fused import graph_names
from fleetune.edge.engine.parameters import Parameters
from fleetune.edge.engine.prefix import split
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.engine.suffix import Part, Suffix
from fleetune.edge.methods.pfedmoe.extractor import Samples
from fleetune.edge.methods.pfedmoe.step import StepGraph

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]
Tensors = Mapping[str, FloatArray]


class Body(Protocol):
    """A private model."""

    @property
    def learned(self) -> Parameters:
        """What is trained of it."""
        ...

    @property
    def gradient(self) -> Parameters:
        """Sum of its gradients over the micro-batches of a batch."""
        ...

    def groups(self, batch: Indices) -> Iterator[tuple[Indices, Tensors]]:
        """Micro-batches: places in the batch, and what of them goes into a step beside the extractor's sample."""
        ...

    def step(self, others: Tensors, into: Tensors, data: Tensors, *, first: bool) -> Tensors:
        """Run a step, and add up gradients.

        Args:
            others: Name in the graph → tensor, of all that is learned beside this model; from batch to batch the same.
            into: The same names → where their gradients are added up.
            data: What :meth:`groups` gave, with ``sample``, ``mask``, ``labels`` and both ``alpha``.
            first: Whether it is the first micro-batch of a batch; what was added up before counts no more.

        Returns:
            What :meth:`~fleetune.edge.methods.pfedmoe.step.StepGraph.run` does.
        """
        ...

    def representation(self, indices: Indices) -> FloatArray:
        """The private representation [n, m] of some samples."""
        ...


class Parts(Protocol):
    """Hidden states at the boundary: a :class:`~fleetune.edge.engine.prefix.Prefix`."""

    def parts(self, groups: Sequence[Indices], /) -> Iterator[Part]:
        """Hidden states and mask of each group of samples in turn."""
        ...


class Run(Protocol):
    """A backbone's suffix on a device, as it is now: a :class:`~fleetune.edge.methods.local.LocalRun`."""

    @property
    def suffix(self) -> Suffix:
        """The active blocks."""
        ...

    @property
    def prefix(self) -> Parts:
        """What they start from."""
        ...

    @property
    def micro_batch(self) -> int:
        """Samples that go through them at once."""
        ...

    def features(self, expert: Expert, indices: Indices, /) -> FloatArray:
        """Features [n, d] of some samples."""
        ...


class BackboneBody:
    """The active blocks of a backbone with their adapters; an expert's head maps features to the representation.

    Args:
        run: The suffix; micro-batches and depth are what it says, from batch to batch.
        expert: The adapters and that map.
    """

    def __init__(self, run: Run, expert: Expert) -> None:
        self.run, self.learned, self.gradient = run, expert, Expert(expert.layout)
        self._graph: tuple[Suffix, StepGraph] | None = None

    def groups(self, batch: Indices) -> Iterator[tuple[Indices, Tensors]]:
        """Hidden states and masks at the boundary."""
        groups = split(np.arange(len(batch)), self.run.micro_batch)
        parts = self.run.prefix.parts([batch[rows] for rows in groups])
        for rows, (hidden, mask) in zip(groups, parts, strict=True):
            yield rows, {"h": hidden, "mask": mask}

    def step(self, others: Tensors, into: Tensors, data: Tensors, *, first: bool) -> Tensors:
        """Run a step, in one graph, or where memory is short block by block."""
        suffix = self.run.suffix
        if self._graph is None or self._graph[0] is not suffix:
            self._graph = suffix, self._bound(suffix, others, into)
        graph = self._graph[1]
        return self._by_blocks(suffix, graph, data, first=first) if suffix.recompute else graph.run(data, first=first)

    def _bound(self, suffix: Suffix, others: Tensors, into: Tensors) -> StepGraph:
        names = {"head.weight": "head.weight", "head.bias": "head.bias"}
        if not suffix.recompute:
            names = graph_names(self.learned.layout, suffix.depth)
        session, frozen = suffix.backbone.fused(0 if suffix.recompute else suffix.depth, "mixture")
        learned, gradient = (
            {name: part.tensors[full] for full, name in names.items()} for part in (self.learned, self.gradient)
        )
        self.gradient.vector[...] = 0  # of what is no longer active nothing is left
        graph = StepGraph(BoundGraph(session), {**learned, **others}, frozen, {**gradient, **into})
        graph.reserve()  # now, while memory is looked at
        return graph

    def _by_blocks(self, suffix: Suffix, graph: StepGraph, data: Tensors, *, first: bool) -> Tensors:
        found: Tensors = {}
        if first:
            self.gradient.vector[...] = 0

        def top(features: FloatArray) -> FloatArray:
            nonlocal found
            below = {name: tensor for name, tensor in data.items() if name != "h"}
            found = graph.run({**below, "features": features}, first=first)
            return found["grad.features"]

        suffix.through(data["h"], data["mask"], self.learned, top, self.gradient)
        return found  # of the only micro-batch that there is

    def representation(self, indices: Indices) -> FloatArray:
        """Features, mapped."""
        return self.learned.logits(self.run.features(self.learned, indices))


class NetworkBody:
    """A small network that is trained whole, as in pFedMoE's paper; it sees the extractor's samples.

    Args:
        sessions: Its graphs.
        learned: Its tensors, under their names in the graphs.
        pictures: What the extractor sees too.
        micro_batch: Samples that go through the networks at once.
    """

    def __init__(self, sessions: Sessions, learned: Parameters, pictures: Samples, *, micro_batch: int = 64) -> None:
        self._sessions, self.learned, self.gradient = sessions, learned, learned.blank()
        self._pictures, self._micro_batch = pictures, micro_batch
        self._graph: StepGraph | None = None

    def groups(self, batch: Indices) -> Iterator[tuple[Indices, Tensors]]:
        """Nothing beside the extractor's samples."""
        for rows in split(np.arange(len(batch)), self._micro_batch):
            yield rows, {}

    def step(self, others: Tensors, into: Tensors, data: Tensors, *, first: bool) -> Tensors:
        """Run a step."""
        if self._graph is None:
            graph = BoundGraph(self._sessions.session("mixture"))
            gradient = {**self.gradient.tensors, **into}
            self._graph = StepGraph(graph, {**self.learned.tensors, **others}, {}, gradient)
        return self._graph.run(data, first=first)

    def representation(self, indices: Indices) -> FloatArray:
        """The private representation [n, m] of some samples."""
        parts = (self._pictures(some) for some in split(indices, self._micro_batch))
        return np.concatenate(
            [self._sessions.run("body", {**part, **self.learned.tensors})["representation"] for part in parts]
        )
