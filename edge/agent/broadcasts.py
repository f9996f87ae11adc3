"""Rounds that were announced, and the global tensors that they still wait for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.messages import Announcement, Need


@dataclass(frozen=True)
class _Wanted:
    announced: Announcement
    downloads: dict[int, chunks.Assembly]


class Broadcasts:
    """The newest announcement of each job; the broker may keep one that nobody leads any more.

    Args:
        state: Where tensors are kept.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._wanted: dict[str, _Wanted] = {}

    def want(self, announced: Announcement) -> None:
        """Expect the tensors of a round that are not here.

        Raises:
            MessageError: The announced sizes exceed the limits.
        """
        downloads = {
            version: chunks.Assembly(payload)
            for version, payload in announced.payloads.items()
            if self._state.payload(payload) is None
        }
        self._wanted[announced.job] = _Wanted(announced, downloads)

    def forget(self, job: str) -> None:
        """A job's announcement does not count any more."""
        self._wanted.pop(job, None)

    def add(self, job: str, version: int, index: int, data: bytes) -> None:
        """Take a chunk, and keep the tensors that it completes.

        Raises:
            MessageError: The chunk does not fit, or the whole has another hash; then all is asked for again.
        """
        downloads = self._wanted[job].downloads if job in self._wanted else {}
        if version in downloads:
            assembly = downloads[version]
            assembly.add(index, data)
            if not assembly.missing:
                self._state.save_payload(assembly.payload, assembly.finish())
                del downloads[version]

    def overdue(self) -> Iterator[Need]:
        """What is to be asked for again."""
        for job, wanted in self._wanted.items():
            for version, assembly in wanted.downloads.items():
                if assembly.overdue():
                    yield Need(job=job, version=version, bitmap=assembly.missing_bitmap())

    def ready(self) -> Announcement | None:
        """A round whose tensors are all here, if there is one; it stays until it is forgotten."""
        return next((wanted.announced for wanted in self._wanted.values() if not wanted.downloads), None)
