"""FedMS: stage 1 (the global expert), stage 2 (local experts and the gate's adapter), evaluate; each stage prepared."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.server.job import Job
from fleetune.server.strategies.base import ClosedRound, NextRound, depth_after

EXPERT = ("blocks.", "head.")
GATE = ("gate.",)


class FedMS:
    """``rounds["global"]`` rounds of stage 1, then ``rounds["personal"]`` rounds of stage 2.

    Before each stage comes a round in which devices compute what is frozen from there on.

    In stage 2 the depth stays where stage 1 left it, so that a local expert has the shape of its global one.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def rounds(self) -> int:
        """Number of rounds in which devices train."""
        return self._job.rounds["global"] + self._job.rounds["personal"]

    def next(self, closed: Sequence[ClosedRound]) -> NextRound | None:
        """The round after these."""
        done = len(closed)
        first, second = self._job.rounds["global"], self._job.rounds["personal"]
        trained = [past for past in closed if past.stage == "global"]
        # Stage 2 keeps the depth of the last round of stage 1, which its own result has no say in.
        depth = depth_after(trained[: first - 1], self._job)
        if done == 0:
            return NextRound("prepare", depth)
        if done <= first:
            return NextRound("global", depth, broadcast=EXPERT, trained=EXPERT)
        if done == first + 1:
            return NextRound("prepare", depth, broadcast=EXPERT)
        if done <= first + 1 + second:
            return NextRound("personal", depth, broadcast=GATE, trained=GATE)
        if closed[-1].stage == "personal":
            return NextRound("evaluate", depth, broadcast=GATE)
        return None
