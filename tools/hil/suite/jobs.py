"""Runs that tests have boards take part in."""

from __future__ import annotations

from collections.abc import Callable

Rounds = Callable[[float], tuple[str, ...]]
"""Options of a run whose rounds take so many seconds, more or less."""

SMALL = ("--classes", "2", "--global-rounds", "1", "--personal-rounds", "1", "--batch", "8")
"""A round of each stage."""

LONG_S = 20.0
"""Seconds of a round that is long enough for something to happen in it."""

DONE_WITHIN_S = 600.0
