"""Runs that tests have boards take part in."""

from __future__ import annotations

SMALL = ("--classes", "2", "--global-rounds", "1", "--personal-rounds", "1", "--batch", "8")
"""A round of each stage."""

LONG = (*SMALL, "--epochs", "12")
"""Rounds that take long enough for something to happen in them."""

DONE_WITHIN_S = 600.0
