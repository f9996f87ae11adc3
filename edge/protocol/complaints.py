"""Log lines about messages that are refused: each sender and reason once, however often it comes."""

from __future__ import annotations

import logging
import time

from fleetune.edge.protocol.errors import MessageError

log = logging.getLogger(__name__)

_AGAIN_AFTER = 600.0
"""Seconds after which the same is said again, and how often it came."""

_MOST = 10_000
"""Senders and reasons that are remembered."""


class Complaints:
    """What was said, and how often it came since."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def about(self, sender: str, error: MessageError) -> None:
        """A message was refused.

        Args:
            sender: Who has sent it, or the topic on which it came.
            error: Why.
        """
        key, now = (sender, error.reason), time.monotonic()
        since, more = self._said.pop(key, (-_AGAIN_AFTER, 0))
        if now - since < _AGAIN_AFTER:
            self._said[key] = since, more + 1
            return
        self._said[key] = now, 0
        if len(self._said) > _MOST:
            del self._said[next(iter(self._said))]
        often = f"; {more} more since this was said last" if more else ""
        log.warning("%s: %s (%s)%s", sender, error, error.reason, often)
