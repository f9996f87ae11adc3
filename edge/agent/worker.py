"""What the agent asks of whoever does the rounds. The agent itself knows of no pack, no engine and no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.messages import Announcement

if TYPE_CHECKING:
    from fleetune.edge.agent.state import State

Metrics = Mapping[str, float | int | str | bool]


class Answer(Protocol):
    """What a round produced: the part that goes up."""

    @property
    def metrics(self) -> Metrics:
        """Figures for the aggregator and the report."""
        ...

    @property
    def tensors(self) -> Tensors:
        """What the round has added to the global tensors; empty if nothing goes up."""
        ...


class Worker(Protocol):
    """Does the rounds of one device."""

    @property
    def samples(self) -> int:
        """Samples that it trains on: the weight of its updates."""
        ...

    @property
    def facts(self) -> Metrics:
        """What the plan is, to show; empty before there is one."""
        ...

    def prepare(self, state: State, say: Callable[[str], None]) -> None:
        """Get ready to plan.

        Args:
            state: What survives a restart.
            say: Is told what goes on, as it may take minutes.

        Raises:
            FleetuneError: It cannot train here.
        """
        ...

    def check_fit(self, announced: Announcement) -> None:
        """See that a job suits this device.

        Raises:
            FleetuneError: It does not.
        """
        ...

    def shapes(self, announced: Announcement) -> Shapes:
        """Full name → shape of every global tensor that a job may have: no other comes down, or goes up.

        Raises:
            FleetuneError: The job does not suit this device.
        """
        ...

    def hindrance(self, announced: Announcement) -> str:
        """What keeps a round from starting now; empty if nothing does.

        Raises:
            FleetuneError: It cannot take part at all.
        """
        ...

    def answer(
        self,
        announced: Announcement,
        tensors: Tensors,
        progress: Callable[[float, float], None],
        pulse: Callable[[], None],
    ) -> Answer:
        """Do a round.

        Args:
            announced: The round.
            tensors: The global tensors, less the initial ones that follow from the seed.
            progress: Is told every now and then how far the round is, a share from 0 to 1, and the loss so far.
            pulse: To be called as often as is easy, so that messages are looked at in a round that takes minutes.

        Raises:
            FleetuneError: It fails.
        """
        ...

    def forget(self) -> None:
        """Take no further part in the job of the round before."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...
