"""The time that certificates and messages are judged by, on boards that wake up in the past.

A board without a battery-backed clock begins in 1970, or where it was switched off. What it has once seen signed cannot
have been in the future: below that its clock never falls. And where a message seems to have expired, or to come from
the future, the board asks the aggregator, whose signed answer carries the question's nonce: nobody can answer with an
earlier time.
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
        self._offset = 0.0

    def now(self) -> float:
        """Unix time in seconds."""
        return max(time.time() + self._offset, self._floor + time.monotonic() - self._since)

    @property
    def doubtful(self) -> bool:
        """Whether this machine's clock shows a time that has passed for sure."""
        return time.time() + self._offset < self._floor - MAX_SKEW

    def passed(self, when: float) -> None:
        """Something was signed at this time by somebody who is believed."""
        if when > self.now():
            self._floor, self._since = when, time.monotonic()

    def set(self, when: float) -> None:
        """It is now this time, as somebody who is believed has just said; no earlier than what has passed for sure."""
        when = max(when, self._floor)
        self._offset = when - time.time()
        self._floor, self._since = when, time.monotonic()
