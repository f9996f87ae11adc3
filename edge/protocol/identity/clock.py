"""The time that certificates and messages are judged by, on boards that wake up in the past.

A board without a battery-backed clock begins in 1970, or where it was switched off. What the authority has signed
cannot have been in the future: below that the clock never falls. What the aggregator says in passing moves it ahead,
too, but may be taken back: an aggregator's clock may be wrong. Where a message seems to have expired, or to come from
the future, the board asks, and the signed answer carries the question's nonce: nobody can answer with an earlier time.
"""

from __future__ import annotations

import time

MAX_SKEW = 300.0
"""Seconds that two clocks of a fleet may differ, and still be believed."""


class Clock:
    """Unix time, as well as this machine can know it.

    Args:
        floor: Unix time that has passed for sure.
    """

    def __init__(self, floor: float = 0.0) -> None:
        self._floor, self._since = floor, time.monotonic()
        # Once somebody has told the time the system's clock does not count: it may be set right at any moment.
        self._told: tuple[float, float] | None = None

    def now(self) -> float:
        """Unix time in seconds."""
        if self._told is None:
            return max(time.time(), self.at_least)
        when, since = self._told
        return max(when + time.monotonic() - since, self.at_least)

    @property
    def at_least(self) -> float:
        """Unix time in seconds that has passed for sure."""
        return self._floor + time.monotonic() - self._since

    def passed(self, when: float) -> None:
        """The authority has signed something at this time."""
        if when > self.at_least:
            self._floor, self._since = when, time.monotonic()

    def told(self, when: float) -> None:
        """It was this time when somebody who is believed said something, who may be wrong."""
        if when > self.now():
            self.set(when)

    def set(self, when: float) -> None:
        """It is now this time, as somebody who is believed has answered just now."""
        self._told = when, time.monotonic()
