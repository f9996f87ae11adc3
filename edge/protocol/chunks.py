"""Cuts a payload into chunks and puts it together again; chunks may come twice, out of order, or not at all.

A payload is known by its hash. What has come of it lies on disk, unless it comes in a moment: a process that is killed
goes on where it stopped, and memory does not grow with what is on its way.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_CHUNKS, MAX_PAYLOAD, Payload

_HERE = 1

_QUICK = 0.5
"""Seconds from the first chunk: what is whole by then need not touch the disk."""

_LITTLE = 2 << 20
"""Bytes that may wait for the rest in memory."""

_CHUNK_COST = 256
"""Bytes that a chunk takes in memory beside its own, about."""


def describe(data: bytes, codec: str, chunk_size: int = MAX_CHUNK) -> Payload:
    """The manifest entry of a payload."""
    return Payload(codec=codec, sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk_size=chunk_size)


def fit(payload: Payload, chunk_size: int) -> Payload:
    """The same payload, in chunks that a broker takes which may be another one than before."""
    if payload.chunk_size <= chunk_size:
        return payload
    return msgspec.structs.replace(payload, chunk_size=chunk_size)


def check(payload: Payload, most: int = MAX_PAYLOAD) -> None:
    """See that an announced payload may be.

    Args:
        payload: What is announced.
        most: Most bytes that what it is for can take.

    Raises:
        MessageError: The announced sizes exceed the limits or do not fit each other.
    """
    for what, size, limit, reason in (
        ("a payload", payload.size, min(most, MAX_PAYLOAD), "payload-too-large"),
        ("chunks", payload.chunk_size, MAX_CHUNK, "chunk-too-large"),
    ):
        if not 0 < size <= limit:
            raise MessageError(f"{what} of {size} bytes announced", f"send 1 to {limit}", reason=reason)
    if payload.chunks > MAX_CHUNKS:
        raise MessageError(
            f"{payload.chunks} chunks are announced", f"send at most {MAX_CHUNKS}", reason="too-many-chunks"
        )


def cut(data: bytes, payload: Payload, indices: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of some chunks."""
    size = payload.chunk_size
    return ((index, data[index * size : (index + 1) * size]) for index in indices)


def pack_bitmap(indices: Iterable[int], count: int) -> bytes:
    """Chunk numbers → bitmap of ``count`` bits."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def unpack_bitmap(bitmap: bytes, count: int) -> Iterator[int]:
    """Bitmap → chunk numbers below ``count``."""
    return (i for i in range(min(count, 8 * len(bitmap))) if bitmap[i // 8] >> i % 8 & 1)


class Assembly:
    """Collects the chunks of one payload; one that was begun in the folder goes on.

    What comes quickly stays in memory: it would come as quickly again. On a slower link it goes to disk chunk by chunk,
    into one file: the bytes, and behind them a byte for each chunk that came. It is not synced: what a power cut loses
    or garbles shows when the whole is hashed, and then all of it is asked for again.

    Args:
        payload: What is announced.
        folder: Created when it is needed.

    Raises:
        MessageError: The announced sizes exceed the limits or do not fit each other.
    """

    def __init__(self, payload: Payload, folder: Path) -> None:
        check(payload)
        self.payload = payload
        self._here = bytearray(payload.chunks)  # 1 for each chunk that came
        self._held: dict[int, bytes] = {}  # not on disk
        self._since = math.inf
        self._path = folder / f"{payload.sha256}-{payload.chunk_size}"
        self._kept = payload.chunks > 1 and self._path.is_file()
        if self._kept:
            with self._path.open("rb") as file:
                file.seek(payload.size)
                marks = file.read(payload.chunks)
            self._here[: len(marks)] = bytes(mark == _HERE for mark in marks)

    @property
    def missing(self) -> list[int]:
        """Numbers of the chunks that did not arrive yet."""
        return [index for index, here in enumerate(self._here) if not here]

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return 0 not in self._here

    @property
    def slow(self) -> bool:
        """Whether it took so long that it is not to be had again for nothing."""
        return self._kept

    def missing_bitmap(self) -> bytes:
        """The missing ones as a bitmap."""
        return pack_bitmap(self.missing, self.payload.chunks)

    def add(self, index: int, data: bytes) -> bool:
        """Take one chunk; False if it was here already.

        Raises:
            MessageError: Its number or its length does not fit the manifest.
            OSError: It cannot be written.
        """
        start = index * self.payload.chunk_size
        if not 0 <= index < self.payload.chunks or len(data) != min(self.payload.chunk_size, self.payload.size - start):
            raise MessageError(
                f"chunk {index} of {len(data)} bytes does not fit the manifest", "send it again", reason="wrong-chunk"
            )
        if self._here[index]:
            return False
        now = time.monotonic()
        self._since = min(self._since, now)
        self._held[index] = data
        self._here[index] = _HERE
        if self._kept or (not self.complete and self._is_much(now)):
            try:
                self._keep()
            except OSError:
                del self._held[index]
                self._here[index] = 0
                raise
        return True

    def _is_much(self, now: float) -> bool:
        return now - self._since > _QUICK or len(self._held) * (self.payload.chunk_size + _CHUNK_COST) > _LITTLE

    def _keep(self) -> None:
        """Write what is in memory."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            # So large at once: a full disk shows before the last chunk.
            os.posix_fallocate(descriptor, 0, self.payload.size + self.payload.chunks)
            for index, data in self._held.items():
                _write_at(descriptor, index * self.payload.chunk_size, data)
                _write_at(descriptor, self.payload.size + index, bytes([_HERE]))
        finally:
            os.close(descriptor)
        self._kept = True
        self._held.clear()

    def let_go(self) -> None:
        """Free the memory that it takes: the chunks in it are to come again."""
        for index in self._held:
            self._here[index] = 0
        self._held.clear()

    def finish(self) -> bytes:
        """The whole payload. The assembly starts over, for a caller that cannot keep it.

        Raises:
            MessageError: Its hash is not the announced one.
        """
        if self._kept:
            with self._path.open("rb") as file:
                data = file.read(self.payload.size)
        else:
            data = b"".join(self._held[index] for index in range(self.payload.chunks))
        self.drop()
        if hashlib.sha256(data).hexdigest() != self.payload.sha256:
            raise MessageError("the payload's hash is not the announced one", "send it again", reason="wrong-hash")
        return data

    def drop_others(self) -> None:
        """Let go of what else was begun in the folder."""
        for file in self._path.parent.glob("*-*"):
            if file != self._path:
                file.unlink()

    def drop(self) -> None:
        """Let go of what has come."""
        if self._kept:
            self._path.unlink(missing_ok=True)
            self._kept = False
        self._held.clear()
        self._here = bytearray(self.payload.chunks)


def _write_at(descriptor: int, start: int, data: bytes) -> None:
    view, written = memoryview(data), 0
    while written < len(data):
        written += os.pwrite(descriptor, view[written:], start + written)
