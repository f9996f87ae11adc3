"""What every strategy is: a function from the closed rounds to the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleetune.edge.protocol.messages import Stage
from fleetune.server.job import Job
from fleetune.server.schedule import scheduled_depth

Metrics = Mapping[str, float | int | str | bool]


@dataclass(frozen=True)
class NextRound:
    """What to announce.

    Attributes:
        stage: What devices do.
        depth: Depth that SAL's schedule asks for.
        broadcast: Prefixes of the global tensors whose newest values go down; all others stay as devices have them.
        trained: Prefixes of those that may come up.
    """

    stage: Stage
    depth: int
    broadcast: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClosedRound:
    """What came out of a round.

    Attributes:
        stage: What devices did.
        means: Mean of every figure over the devices that reported it as a finite number.
    """

    stage: Stage
    means: Mapping[str, float]


class Strategy(Protocol):
    """Leads one job. It keeps no state: a restarted aggregator asks it the same question again."""

    def __init__(self, job: Job) -> None: ...

    @property
    def rounds(self) -> int:
        """Number of rounds in which devices train."""
        ...

    def next(self, closed: Sequence[ClosedRound]) -> NextRound | None:
        """The round after these, or None when the job is done."""
        ...


class OneStage:
    """``rounds["train"]`` rounds of one kind, after one in which devices compute what is frozen for good.

    Attributes:
        shared: Prefixes of the global tensors that go down and come up in every round; none where devices train alone.
    """

    shared: tuple[str, ...] = ()

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
        return NextRound("train", depth_after(closed, self._job), broadcast=self.shared, trained=self.shared)


def trains(stage: Stage) -> bool:
    """Whether devices train in a round of this stage, so that it counts as one."""
    return stage in ("global", "personal", "train")


def depth_after(closed: Sequence[ClosedRound], job: Job) -> int:
    """SAL's depth for the next round, from the fleet's mean accuracy on ``val``."""
    results = [past.means["val"] for past in closed if "val" in past.means]
    return scheduled_depth(results, job.schedule, int(job.settings["max_depth"]))
