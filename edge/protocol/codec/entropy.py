"""Entropy coding: DEFLATE, from the standard library; quick enough for any board."""

from __future__ import annotations

import zlib

from fleetune.edge.protocol.errors import MessageError


def compress(data: bytes) -> bytes:
    """Fewer bytes for what is likely."""
    # Packed numbers repeat by accident only: what counts is Huffman's coding of single bytes.
    encoder = zlib.compressobj(level=6, strategy=zlib.Z_FILTERED)
    return encoder.compress(data) + encoder.flush()


def most_compressed(size: int) -> int:
    """Bytes that so many take when nothing of them is likely (``compressBound`` of zlib)."""
    return size + (size >> 12) + (size >> 14) + (size >> 25) + 13


def decompress(data: bytes, limit: int) -> bytes:
    """The bytes as they were.

    Raises:
        MessageError: They are damaged, or more than ``limit``; no more than that is ever in memory.
    """
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise MessageError(f"a payload is damaged: {error}", "encode it again", reason="malformed") from error
    if len(found) > limit:
        raise MessageError(f"a payload holds more than {limit} bytes", "send fewer", reason="payload-too-large")
    if not decoder.eof or decoder.unused_data:
        raise MessageError("a payload is cut off, or goes on behind its end", "encode it again", reason="malformed")
    return found
