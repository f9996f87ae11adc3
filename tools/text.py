"""Tables and progress for people, on a device too: of plain characters, with nothing but the standard library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

_CELLS = 30


def visible(text: str) -> str:
    """A text from elsewhere, so that it is one line and moves no cursor: what cannot be printed is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class LineFormatter(logging.Formatter):
    """A record is one line, whatever it quotes; what is unforeseen has the lines of its traceback below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's own line."""
        return visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback's lines."""
        return "\n".join(map(visible, super().formatException(ei).split("\n")))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table under each other: words to the left, numbers to the right; no cell moves a cursor."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    numbers = [all(_is_number(row[place]) for row in rows[1:]) for place in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell[0].isdigit()


class Bar:
    """How far a long command is, on standard error: one line that grows, or without a terminal a line a step.

    Args:
        what: What is done.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps are done."""
        filled = _CELLS * done // total
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            text = f"\r{self._what} {'█' * filled}{'░' * (_CELLS - filled)} {done} of {total}{end}"
        else:
            text = f"{self._what}: {done} of {total}\n"
        sys.stderr.write(text)
        sys.stderr.flush()


def say(words: str) -> None:
    """Tell the user what is done next, where it is no part of the result."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def utc(when: float) -> str:
    """A Unix time, as ISO 8601 has it."""
    return datetime.fromtimestamp(when, timezone.utc).isoformat()
