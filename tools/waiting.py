"""Waits until something is so, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    is_so: Callable[[], bool], within_s: float, late: Callable[[], Exception], *, every_s: float = 0.5
) -> None:
    """Wait.

    Args:
        is_so: Asked again and again; it may raise.
        within_s: Seconds.
        late: The error to raise when it is not so in time.
        every_s: Seconds between two questions.
    """
    ends = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > ends:
            raise late()
        time.sleep(every_s)
