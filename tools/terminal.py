"""Words for people: as wide as their terminal, and one line for each step where nothing can be drawn over."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

_WIDTH = 160
"""Columns of a file or a pipe, where a narrow table would only break its words."""


def open_console(*, stderr: bool) -> Console:
    """Standard error or standard output."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH)


@contextmanager
def show_steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Say what a long command does next."""
    with console.status("starts") as status:
        yield status.update if console.is_terminal else console.print
