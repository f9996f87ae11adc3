"""Which announcements count: none that is older than one that was heard, and none that has expired.

A broker that plants an old announcement again gets nowhere with it. But a board's clock may be wrong, and so may an
aggregator's that was set back: where an announcement is in doubt the device asks for the time, and the signed answer to
its nonce settles it.
"""

from __future__ import annotations

import secrets
import time

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW, Clock
from fleetune.edge.protocol.messages import Announcement, TimeReply, TimeRequest

_ASK_EVERY = 5.0
"""Seconds between two questions."""

_FORGET_AFTER = 3 * 24 * 3600.0
"""Seconds after which an announcement has expired, however the clocks differ."""


class Heard:
    """The newest announcement of each job.

    Args:
        newest: Job → when its newest announcement was issued; changed in place, and kept by the caller.
        clock: The device's.
    """

    def __init__(self, newest: dict[str, float], clock: Clock) -> None:
        self._newest, self._clock = newest, clock
        self._nonce = ""
        self._in_doubt = False
        self._asked = -_ASK_EVERY

    def check(self, announced: Announcement) -> None:
        """See that an announcement counts.

        Raises:
            MessageError: It is older than one that was heard (``replayed``), or has expired (``expired``).
        """
        before = self._newest.get(announced.job, 0.0)
        if announced.issued < before:
            self._in_doubt = True
            raise MessageError(
                f"an announcement of {announced.job} from {before - announced.issued:.0f} s before the newest",
                "see who sends it, or the aggregator's clock",
                reason="replayed",
            )
        if announced.expires + MAX_SKEW < self._clock.now():
            self._in_doubt = True
            raise MessageError(
                f"an announcement of {announced.job} has expired by this device's clock",
                "set the clock, or start the aggregator again",
                reason="expired",
            )
        self._newest[announced.job] = announced.issued
        for job in [job for job, issued in self._newest.items() if issued < announced.issued - _FORGET_AFTER]:
            del self._newest[job]

    def question(self) -> TimeRequest | None:
        """What to ask, if an announcement is in doubt."""
        if not self._in_doubt or time.monotonic() - self._asked < _ASK_EVERY:
            return None
        self._in_doubt, self._asked, self._nonce = False, time.monotonic(), secrets.token_hex(16)
        return TimeRequest(self._nonce)

    def answer(self, reply: TimeReply) -> bool:
        """Take the time; True if an announcement that was refused may count after all.

        Raises:
            MessageError: It answers another question.
        """
        if not self._nonce or reply.nonce != self._nonce:
            raise MessageError("an answer to a question that was not asked", "none", reason="replayed")
        self._nonce = ""
        # Half of what the question took is the error: nothing beside the skew that is allowed.
        wrong = abs(self._clock.now() - reply.now) > MAX_SKEW
        if wrong:
            self._clock.set(reply.now)
        fallen = [job for job, issued in self._newest.items() if issued > reply.now]
        for job in fallen:  # the aggregator's clock was set back: whatever it has said since counts, as long as it may
            del self._newest[job]
        return wrong or bool(fallen)
