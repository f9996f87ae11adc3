"""Watches a round while it runs."""

from __future__ import annotations

from fleetune.edge.resources.process import cpu_seconds


class Guard:
    """Ends the training of a round, at a step's boundary, before its CPU seconds are spent.

    Args:
        cpu_s: CPU seconds of the round; None for no limit.
    """

    def __init__(self, cpu_s: float | None = None) -> None:
        self._limit = cpu_s
        self._start = cpu_seconds()
        self._asked: float | None = None
        self._longest_step = 0.0
        self.stopped_early = False

    def must_stop(self, reserve: float) -> bool:
        """Whether training must end now. Ask before each step.

        Args:
            reserve: CPU seconds that the round needs after training. The longest step so far is kept back as well,
                for the step that comes next.
        """
        now = cpu_seconds()
        if self._asked is not None:
            self._longest_step = max(self._longest_step, now - self._asked)
        self._asked = now
        if self._limit is not None and now - self._start + self._longest_step + reserve > self._limit:
            self.stopped_early = True
        return self.stopped_early
