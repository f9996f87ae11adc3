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
        self.stopped_early = False

    @property
    def spent(self) -> float:
        """CPU seconds since the round began."""
        return cpu_seconds() - self._start

    def must_stop(self, reserve: float) -> bool:
        """Whether training must end now for the round to keep ``reserve`` CPU seconds for its evaluation."""
        if self._limit is not None and self.spent + reserve > self._limit:
            self.stopped_early = True
        return self.stopped_early
