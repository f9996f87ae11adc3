"""pFedMoE: the shared extractor goes down and up in every round; all else stays on the devices."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.server.job import Job
from fleetune.server.strategies.base import ClosedRound, NextRound, depth_after

EXTRACTOR = ("extractor.",)


class PFedMoE:
    """``rounds["train"]`` rounds, after one in which devices compute what is frozen for good."""

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
        return NextRound("train", depth_after(closed, self._job), broadcast=EXTRACTOR, trained=EXTRACTOR)
