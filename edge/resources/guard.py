"""Watches a round while it runs."""

from __future__ import annotations

import enum
from collections.abc import Callable

from fleetune.edge.resources.process import Stopwatch


class Verdict(enum.Enum):
    """What training is to do before its next step."""

    GO = "go"
    EASE = "ease"
    STOP = "stop"


class Guard:
    """Ends the training of a round before its time is spent, and asks it to do with less memory where that is short.

    Args:
        cpu_s: CPU seconds of the round; None for no limit.
        seconds: Seconds of the round; None for no limit.
        excess_mib: Says how much memory this process should give back; None for never any.

    Attributes:
        stopped_for: Why: ``cpu``, ``time`` or ``memory``; empty if it did not.
        eased: How often training was asked to do with less memory.
        wanted_mib: How much less, when it was asked last.
    """

    def __init__(
        self,
        cpu_s: float | None = None,
        *,
        seconds: float | None = None,
        excess_mib: Callable[[], float] | None = None,
    ) -> None:
        self._limits = (seconds, cpu_s)
        self._excess_mib = excess_mib
        self._watch = Stopwatch()
        self._asked: tuple[float, float] | None = None
        self._longest_step = (0.0, 0.0)
        self.stopped_for = ""
        self.eased = 0
        self.wanted_mib = 0.0

    @property
    def stopped_early(self) -> bool:
        """Whether training ended before its last step."""
        return bool(self.stopped_for)

    def before_step(self, reserve: tuple[float, float]) -> Verdict:
        """What to do. Ask before each step.

        Args:
            reserve: Seconds and CPU seconds that the round needs after training. The longest step so far is kept back
                as well, for the step that comes next.
        """
        now = self._watch.read()
        if self._asked is not None:
            step = (now[0] - self._asked[0], now[1] - self._asked[1])
            self._longest_step = (max(self._longest_step[0], step[0]), max(self._longest_step[1], step[1]))
        self._asked = now
        for name, spent, longest, later, limit in zip(
            ("time", "cpu"), now, self._longest_step, reserve, self._limits, strict=True
        ):
            if limit is not None and spent + longest + later > limit:
                self.stopped_for = name
                return Verdict.STOP
        self.wanted_mib = 0.0 if self._excess_mib is None else self._excess_mib()
        if self.wanted_mib <= 0:
            return Verdict.GO
        self.eased += 1
        return Verdict.EASE

    def give_up(self) -> None:
        """Training cannot do with less memory: it ends."""
        self.stopped_for = "memory"
