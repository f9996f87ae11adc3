"""Rounds that were announced, and the global tensors that they still wait for."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import EXACT, Codec, Tensors, add_differences
from fleetune.edge.protocol.codec.numbers import Shapes
from fleetune.edge.protocol.errors import MessageError, RunFailedError
from fleetune.edge.protocol.files import is_full
from fleetune.edge.protocol.messages import Announcement, Need, Payload

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds for a chunk that is on its way; asked for too soon, a slow link carries it twice."""

_SOON = 0.2
"""Seconds, at most, before chunks are asked for that nobody is sending."""

_LONGEST_PATIENCE = 60.0


@dataclass
class _Download:
    assembly: chunks.Assembly
    patience: float
    asked: bool = False
    in_vain: int = 0
    since: float = field(default_factory=time.monotonic)
    slowest: float = 0.0

    @property
    def while_under_way(self) -> float:
        """Seconds that the next chunk may take: some times what the slowest one took."""
        return min(_LONGEST_PATIENCE, max(_PATIENCE, 4 * self.slowest))


class Broadcasts:
    """The newest announcement of each job, and its download; the broker may keep one that nobody leads any more.

    Args:
        state: Where tensors are kept.
        shapes: Tells which tensors an announced job may have; whatever else comes is refused.
    """

    def __init__(self, state: State, shapes: Callable[[Announcement], Shapes]) -> None:
        self._state, self._shapes_of = state, shapes
        self._newest: dict[str, Announcement] = {}
        self._shapes: dict[str, Shapes] = {}
        self._useless: dict[str, MessageError] = {}  # job → why the tensors that were announced are none of it
        self._downloads: dict[str, _Download] = {}
        self._no_room_until = 0.0

    def want(self, announced: Announcement, *, under_way: bool) -> None:
        """Expect the tensors of a round, if they are not here.

        Args:
            announced: The round.
            under_way: Whether their chunks are being sent just now.

        Raises:
            FleetuneError: The job does not suit this device, or no tensors of it can be as announced.
            OSError: They cannot be written.
        """
        shapes = self._shapes_of(announced)
        _check(announced, shapes)
        job, before = announced.job, self._downloads.pop(announced.job, None)
        self._newest[job], self._shapes[job] = announced, shapes
        self._useless.pop(job, None)
        if announced.whole is None or self._has(announced):
            return
        payload = announced.whole
        if announced.changes is not None and (announced.since is None or self._state.has_globals(announced.since)):
            payload = announced.changes
        under_way = under_way and payload is announced.changes
        patience = _PATIENCE if under_way else random.uniform(0, _SOON)  # noqa: S311 - not the whole fleet at once
        if before is not None and before.assembly.payload == payload:
            before.patience = patience
        else:
            before = self._download(payload, job, patience=patience)
        self._downloads[job] = before

    @property
    def waits(self) -> bool:
        """Whether something is on its way, or should be."""
        return bool(self._downloads)

    def hurry(self) -> None:
        """Nobody sends what is still missing: the connection broke meanwhile."""
        for download in self._downloads.values():
            download.patience = random.uniform(0, _SOON)  # noqa: S311

    def forget(self, job: str) -> None:
        """A job's announcement does not count any more."""
        self._newest.pop(job, None)
        self._shapes.pop(job, None)
        self._useless.pop(job, None)
        if (download := self._downloads.pop(job, None)) is not None:
            download.assembly.drop()

    def add(self, job: str, sha256: str, index: int, data: bytes) -> bool:
        """Take a chunk; True if it was the last that the round waits for.

        Raises:
            MessageError: The chunk does not fit, or the whole has another hash; then all is asked for again.
            OSError: It cannot be written; a round whose tensors are all here is ready all the same.
        """
        download = self._downloads.get(job)
        if download is None or download.assembly.payload.sha256 != sha256:
            return False
        if download.assembly.add(index, data):
            now = time.monotonic()
            download.slowest = max(download.slowest, now - download.since)
            download.since, download.in_vain = now, 0
            download.patience = download.while_under_way
        if not download.assembly.complete:
            return False
        announced = self._newest[job]
        assert announced.whole is not None
        payload, slow, data = download.assembly.payload, download.assembly.slow, download.assembly.finish()
        try:
            whole, tensors = self._follow(announced, payload, data)
        except MessageError as error:
            if payload == announced.whole:  # as it was announced: it would come again as it is
                del self._downloads[job]
                self._useless[job] = error
                return True
            log.warning("%s: %s; asks for the whole", job, error)
            self._downloads[job] = self._download(announced.whole, job, patience=_SOON)
            return False
        del self._downloads[job]
        self._state.save_globals(announced.whole.sha256, whole, tensors, on_disk=slow)
        return True

    def _follow(self, announced: Announcement, payload: Payload, data: bytes) -> tuple[bytes, Tensors]:
        """The announced tensors and their bytes, from the whole or from what changed.

        Raises:
            MessageError: What came does not lead there.
        """
        assert announced.whole is not None
        tensors = Codec.named(payload.codec).decode(data, self._shapes[announced.job])
        if payload == announced.whole:
            return data, tensors
        tensors = add_differences(self._state.load_globals(announced.since), tensors)
        whole = EXACT.encode(tensors)
        if chunks.describe(whole, EXACT.name).sha256 != announced.whole.sha256:
            raise MessageError("the changes do not lead to the announced tensors", "ask for all", reason="wrong-hash")
        return whole, tensors

    def _download(self, payload: Payload, job: str, *, patience: float) -> _Download:
        """Begin a download; of what was begun for the job before nothing stays."""
        assembly = chunks.Assembly(payload, self._state.parts(job))
        assembly.drop_others()
        return _Download(assembly, patience)

    def overdue(self) -> Iterator[Need]:
        """What is to be asked for: nothing of it came for a while."""
        self._begin_again()
        now = time.monotonic()
        for job, download in self._downloads.items():
            if now - download.since > download.patience:
                download.patience = min(_LONGEST_PATIENCE, download.while_under_way * 2**download.in_vain)
                download.since, download.asked = now, True
                download.in_vain += 1
                payload = download.assembly.payload
                yield Need(job=job, sha256=payload.sha256, bitmap=download.assembly.missing_bitmap())

    def _begin_again(self) -> None:
        """Where a disk that is full or damaged has left a round without its tensors, and nothing on its way."""
        for job, announced in self._newest.items():
            if job in self._downloads or self._is_here(announced) or time.monotonic() < self._no_room_until:
                continue
            try:
                self.want(announced, under_way=False)
            except OSError as error:
                if not is_full(error):
                    raise
                self._no_room_until = time.monotonic() + _PATIENCE
                log.warning("%s: no room for global tensors: %s", job, error.strerror)

    def _has(self, announced: Announcement) -> bool:
        return announced.whole is None or self._state.has_globals(announced.whole.sha256)

    def _is_here(self, announced: Announcement) -> bool:
        """Whether nothing more comes for a round, be it of use or not."""
        return announced.job in self._useless or self._has(announced)

    def asked(self) -> set[tuple[str, str]]:
        """Job and hash of every payload that is not whole yet and of which chunks were asked for."""
        return {(job, download.assembly.payload.sha256) for job, download in self._downloads.items() if download.asked}

    def ready(self) -> Announcement | None:
        """A round whose tensors are all here, if there is one; it stays until it is forgotten."""
        return next((a for job, a in self._newest.items() if job not in self._downloads and self._is_here(a)), None)

    def tensors(self, announced: Announcement) -> Tensors:
        """The global tensors of a round that is ready.

        Raises:
            MessageError: They are damaged.
            RunFailedError: What was announced are no tensors of the job.
        """
        if (why := self._useless.get(announced.job)) is not None:
            raise RunFailedError(f"the aggregator's global tensors are of no use: {why.what}", why.remedy) from why
        return self._state.load_globals(announced.whole.sha256 if announced.whole is not None else None)


def _check(announced: Announcement, shapes: Shapes) -> None:
    """Refuse what the job's tensors cannot be, before any of it is asked for.

    Raises:
        MessageError: A payload is larger than these tensors, or is encoded as none of its kind is.
    """
    for payload, codec in ((announced.whole, EXACT), (announced.changes, None)):
        if payload is not None:
            codec = codec or Codec.named(payload.codec)
            if codec.name != payload.codec:
                raise MessageError(
                    f"global tensors as {payload.codec}", f"announce them as {codec.name}", reason="unknown-codec"
                )
            chunks.check(payload, codec.most(shapes))
