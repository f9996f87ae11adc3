"""Decisions from bytes: the same bytes always make the same input, fewer bytes a simpler one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decides by bytes; once they are used up, it always decides for the first.

    Args:
        data: From whoever looks for failures: hypothesis, a random generator, or a coverage-guided fuzzer.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """The next bytes, as far as there are so many."""
        found = self._data[self._at : self._at + count]
        self._at += count
        return found

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self._at >= len(self._data)

    def below(self, count: int) -> int:
        """A number from 0 to one less than ``count``."""
        return int.from_bytes(self.take(1 if count <= 256 else 3), "little") % count

    def pick(self, options: Sequence[T]) -> T:
        """One of several."""
        return options[self.below(len(options))]

    def often(self) -> bool:
        """Mostly true."""
        return self.below(8) < 7
