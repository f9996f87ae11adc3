"""Cuts a payload into chunks and puts it together again; chunks may come twice, out of order, or not at all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_PAYLOAD, Payload

_REPAIR_AFTER = 1.0
"""Seconds without a new chunk after which the missing ones are asked for."""

MAX_CHUNKS = 1 << 16
"""Most chunks of a payload: their bitmap fits a message."""


def describe(data: bytes, codec: str, chunk_size: int = MAX_CHUNK) -> Payload:
    """The manifest entry of a payload."""
    return Payload(codec=codec, sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk_size=chunk_size)


def chunk(data: bytes, payload: Payload, index: int) -> bytes:
    """One chunk."""
    return data[index * payload.chunk_size : (index + 1) * payload.chunk_size]


def pack_bitmap(indices: list[int], count: int) -> bytes:
    """Chunk numbers → bitmap of ``count`` bits."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def unpack_bitmap(bitmap: bytes, count: int) -> Iterator[int]:
    """Bitmap → chunk numbers below ``count``."""
    return (i for i in range(min(count, 8 * len(bitmap))) if bitmap[i // 8] >> i % 8 & 1)


class Assembly:
    """Collects the chunks of one payload.

    Memory is taken only after the announced size was checked, and only once.

    Raises:
        MessageError: The announced sizes exceed the limits or do not fit each other.
    """

    def __init__(self, payload: Payload) -> None:
        if not 0 < payload.size <= MAX_PAYLOAD:
            raise MessageError(
                f"a payload of {payload.size} bytes is announced",
                f"send 1 to {MAX_PAYLOAD}",
                reason="payload-too-large",
            )
        if not 0 < payload.chunk_size <= MAX_CHUNK:
            raise MessageError(
                f"chunks of {payload.chunk_size} bytes are announced",
                f"send 1 to {MAX_CHUNK}",
                reason="chunk-too-large",
            )
        if payload.chunks > MAX_CHUNKS:
            raise MessageError(
                f"{payload.chunks} chunks are announced", f"send at most {MAX_CHUNKS}", reason="too-many-chunks"
            )
        self.payload = payload
        self._data = bytearray(payload.size)
        self._missing = set(range(payload.chunks))
        self._last = time.monotonic()

    @property
    def missing(self) -> list[int]:
        """Numbers of the chunks that did not arrive yet."""
        return sorted(self._missing)

    def missing_bitmap(self) -> bytes:
        """The same as a bitmap."""
        return pack_bitmap(self.missing, self.payload.chunks)

    def overdue(self) -> bool:
        """Whether no chunk came for a while and the missing ones are to be asked for; the time then starts anew."""
        now = time.monotonic()
        if now - self._last < _REPAIR_AFTER:
            return False
        self._last = now
        return True

    def add(self, index: int, data: bytes) -> None:
        """Take one chunk; a second copy changes nothing.

        Raises:
            MessageError: Its number or its length does not fit the manifest.
        """
        start = index * self.payload.chunk_size
        if not 0 <= index < self.payload.chunks or len(data) != min(self.payload.chunk_size, self.payload.size - start):
            raise MessageError(
                f"chunk {index} of {len(data)} bytes does not fit the manifest", "send it again", reason="wrong-chunk"
            )
        self._last = time.monotonic()
        if index in self._missing:
            self._data[start : start + len(data)] = data
            self._missing.remove(index)

    def finish(self) -> bytes:
        """The whole payload.

        Raises:
            MessageError: Its hash is not the announced one; the assembly starts over.
        """
        data = bytes(self._data)
        if hashlib.sha256(data).hexdigest() != self.payload.sha256:
            self._missing = set(range(self.payload.chunks))
            raise MessageError("the payload's hash is not the announced one", "send it again", reason="wrong-hash")
        return data
