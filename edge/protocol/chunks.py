"""Cuts a payload into chunks and puts it together again; chunks may come twice, out of order, or not at all.

A payload is known by its hash. What has come of it lies on disk, so that a process that is killed goes on where it
stopped, and memory does not grow with what is on its way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_PAYLOAD, Payload

MAX_CHUNKS = 1 << 16
"""Most chunks of a payload: their bitmap fits a message."""

_HERE = b"\1"


def describe(data: bytes, codec: str, chunk_size: int = MAX_CHUNK) -> Payload:
    """The manifest entry of a payload."""
    return Payload(codec=codec, sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk_size=chunk_size)


def fit(payload: Payload, chunk_size: int) -> Payload:
    """The same payload, in chunks that a broker takes which may be another one than before."""
    if payload.chunk_size <= chunk_size:
        return payload
    return msgspec.structs.replace(payload, chunk_size=chunk_size)


def check(payload: Payload) -> None:
    """See that an announced payload may be.

    Raises:
        MessageError: The announced sizes exceed the limits or do not fit each other.
    """
    for what, size, most, reason in (
        ("a payload", payload.size, MAX_PAYLOAD, "payload-too-large"),
        ("chunks", payload.chunk_size, MAX_CHUNK, "chunk-too-large"),
    ):
        if not 0 < size <= most:
            raise MessageError(f"{what} of {size} bytes announced", f"send 1 to {most}", reason=reason)
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
    """Collects the chunks of one payload in a folder; one that was begun there goes on.

    One file: the bytes, and behind them a byte for each chunk that came. It is not synced: what a power cut loses or
    garbles shows when the whole is hashed, and then all of it is asked for again. A single chunk needs no file.

    Args:
        payload: What is announced.
        folder: Created if it does not exist.

    Raises:
        MessageError: The announced sizes exceed the limits or do not fit each other.
        OSError: The folder cannot be written to.
    """

    def __init__(self, payload: Payload, folder: Path) -> None:
        check(payload)
        self.payload = payload
        self._only = b""
        self._missing = set(range(payload.chunks))
        self._path = folder / f"{payload.sha256}-{payload.chunk_size}"
        if payload.chunks == 1:
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        size = payload.size + payload.chunks
        with self._path.open("a+b") as file:  # so large at once: a full disk shows before the last chunk
            os.posix_fallocate(file.fileno(), 0, size)
            file.seek(payload.size)
            here = file.read(payload.chunks)
        self._missing -= {index for index in self._missing if here[index : index + 1] == _HERE}

    @property
    def missing(self) -> list[int]:
        """Numbers of the chunks that did not arrive yet."""
        return sorted(self._missing)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return not self._missing

    def missing_bitmap(self) -> bytes:
        """The missing ones as a bitmap."""
        return pack_bitmap(self._missing, self.payload.chunks)

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
        if index not in self._missing:
            return False
        if self.payload.chunks == 1:
            self._only = data
        else:
            _write_at(self._path, start, data)
            _write_at(self._path, self.payload.size + index, _HERE)
        self._missing.remove(index)
        return True

    def finish(self) -> bytes:
        """The whole payload. The assembly starts over, for a caller that cannot keep it.

        Raises:
            MessageError: Its hash is not the announced one.
        """
        data = self._only
        if not data:
            with self._path.open("rb") as file:
                data = file.read(self.payload.size)
        self.drop()
        self._missing = set(range(self.payload.chunks))
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
        self._path.unlink(missing_ok=True)


def _write_at(path: Path, start: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view, written = memoryview(data), 0
        while written < len(data):
            written += os.pwrite(descriptor, view[written:], start + written)
    finally:
        os.close(descriptor)
