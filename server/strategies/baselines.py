"""Baselines: devices train alone, and nothing is broadcast or aggregated."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.server.job import Job
from fleetune.server.strategies.base import ClosedRound, NextRound, depth_after


class Standalone:
    """``rounds["train"]`` rounds of private training, under the same schedule as a federation."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def rounds(self) -> int:
        """Number of rounds in which devices train."""
        return self._job.rounds["train"]

    def next(self, closed: Sequence[ClosedRound]) -> NextRound | None:
        """The round after these."""
        if not closed:
            return NextRound("prepare", self._job.schedule.start)
        if len(closed) > self.rounds:
            return None
        return NextRound("train", depth_after(closed, self._job))


class FrozenHead(Standalone):
    """One round: a head on the frozen backbone."""
