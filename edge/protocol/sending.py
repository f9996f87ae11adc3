"""Many messages on their way, of which few are with the broker at any time."""

from __future__ import annotations

from collections.abc import Iterable


class Sending:
    """Messages that go out through the link's window, one after the other.

    Attributes:
        done: Whether the broker has acknowledged the last.
        lost: Whether the link went down before: then some may have arrived, and all are to be sent again.
    """

    def __init__(self, messages: Iterable[tuple[str, bytes]], expiry: int | None) -> None:
        self._messages, self._expiry = iter(messages), expiry
        self._ahead = next(self._messages, None)
        self._unanswered = 0
        self.lost = False

    @property
    def done(self) -> bool:
        """Whether the broker has acknowledged the last."""
        return self._ahead is None and not self._unanswered and not self.lost

    @property
    def over(self) -> bool:
        """Whether nothing of it is on its way any more."""
        return self.done or self.lost

    @property
    def waits(self) -> bool:
        """Whether there is more to send."""
        return self._ahead is not None and not self.lost

    def next(self) -> tuple[str, bytes, int | None]:
        """The next message, and its expiry."""
        assert self._ahead is not None
        topic, payload = self._ahead
        self._ahead = next(self._messages, None)
        self._unanswered += 1
        return topic, payload, self._expiry

    def cancel(self) -> None:
        """Send no more of them."""
        self._ahead = None

    def acknowledged(self) -> None:
        """One of them has arrived at the broker."""
        self._unanswered -= 1
