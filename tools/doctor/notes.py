"""What works, but should be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fleetune.tools.doctor.host import Check


class Note(NamedTuple):
    """Something to know.

    Attributes:
        what: What it is.
        advice: What could be done about it; empty where that is nothing.
    """

    what: str
    advice: str = ""


def noted(name: str, found: str, notes: Sequence[Note]) -> Check:
    """A check that did not fail: a note where there is something to know, else ok."""
    advice = "; ".join(dict.fromkeys(note.advice for note in notes if note.advice))
    return Check(name, "note" if notes else "ok", "; ".join([found, *(note.what for note in notes)]), advice)
