"""An entry of the prefix cache: a folder with the hidden states of every token, the means of every sample, and
``entry.json``, which says what they are and holds their hashes.

Samples lie one after the other, the shortest first, without padding: where one begins follows from the lengths. They
are read with ``pread``, not mapped: what is read goes into one small buffer and nothing else counts as this process's
memory, and a file that was cut off is an error instead of the end of the process.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.prefix import ComputedPrefix, Indices, Prefix, by_length
from fleetune.edge.engine.suffix import Part
from fleetune.edge.engine.tokens import CODECS, CodecName, TokenCodec
from fleetune.edge.pack.manifest import File
from fleetune.edge.protocol.errors import UNDECODABLE, FileAccessError
from fleetune.edge.protocol.files import file_sha256, write_atomic
from fleetune.edge.protocol.messages import encode

FloatArray = NDArray[np.float32]

SCHEMA = 1
FILE, HIDDEN, POOLED = "entry.json", "hidden", "pooled"
_MAX_FILE = 1 << 16


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``entry.json`` says.

    Attributes:
        schema: Version of this layout.
        key: Hash of everything that the hidden states depend on.
        codec: How a token is stored.
        boundary: The hidden states are the input of this block.
        samples: Number of samples, n.
        tokens: Tokens of all samples.
        width: Width of the hidden state, d.
        files: Sizes and hashes of the other two.
    """

    schema: int
    key: str
    codec: CodecName
    boundary: int
    samples: int
    tokens: int
    width: int
    files: dict[str, File]

    @classmethod
    def blank(cls, key: str, codec: CodecName, boundary: int, lengths: NDArray[np.int64], width: int) -> Entry:
        """An entry before it is written: everything but the hashes."""
        samples, tokens = len(lengths), int(lengths.sum())
        sizes = {HIDDEN: tokens * CODECS[codec].record(width).itemsize, POOLED: samples * width * 4}
        files = {name: File(size, "0" * 64) for name, size in sizes.items()}
        return cls(SCHEMA, key, codec, boundary, samples, tokens, width, files)

    @property
    def size(self) -> int:
        """Bytes of its three files."""
        return len(encode(self)) + sum(file.bytes for file in self.files.values())


def write_entry(folder: Path, blank: Entry, source: ComputedPrefix) -> None:
    """Compute an entry and write it to the disk, into an empty folder that counts once it is renamed.

    Raises:
        DataError: A hidden state is not finite, or too large for the format.
        OSError: The disk is full or fails.
    """
    codec = CODECS[blank.codec]
    with (folder / HIDDEN).open("xb") as hidden_file, (folder / POOLED).open("xb") as pooled_file:
        hidden_out, pooled_out = _Hashed(hidden_file), _Hashed(pooled_file)
        for some, (hidden, mask), means in source.sweep():
            records = codec.encode(hidden[mask[:, 0] > 0])
            samples, what = np.repeat(some, source.lengths[some]), f"the hidden state before block {blank.boundary}"
            source.dataset.check_finite(samples, records["values"], f"{what}, as {blank.codec},")
            hidden_out.write(records)
            pooled_out.write(means)
        files = {HIDDEN: hidden_out.finish(), POOLED: pooled_out.finish()}
    write_atomic(folder / FILE, encode(msgspec.structs.replace(blank, files=files)))


class _Hashed:
    """Writes arrays, one after the other, and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, array: NDArray[Any]) -> None:
        data = array.tobytes()
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> File:
        """Force it onto the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return File(self._file.tell(), self._digest.hexdigest())


def what_is_wrong(folder: Path, blank: Entry) -> str | None:
    """Why the entry in a folder is not what ``blank`` describes, or None if it is; hashes all of it."""
    try:
        with (folder / FILE).open("rb") as description:
            found = msgspec.json.decode(description.read(_MAX_FILE), type=Entry)
        if msgspec.structs.replace(found, files=blank.files) != blank or found.files.keys() != blank.files.keys():
            return f"{FILE} describes another entry"
        for name, file in found.files.items():
            if (folder / name).stat().st_size != blank.files[name].bytes:
                return f"{name} has another size"
            if file_sha256(folder / name) != file.sha256:
                return f"{name} has another SHA-256"
    except (OSError, *UNDECODABLE) as error:
        return str(error)
    return None


class StoredPrefix(Prefix):
    """Reads an entry that :func:`what_is_wrong` found whole. Its parts share one buffer.

    Args:
        folder: The entry.
        entry: What it holds.
        lengths: Tokens of each sample [n].
    """

    def __init__(self, folder: Path, entry: Entry, lengths: NDArray[np.int64]) -> None:
        super().__init__(entry.boundary, lengths)
        self.folder, self._width = folder, entry.width
        self._codec: TokenCodec = CODECS[entry.codec]
        self._file = os.open(folder / HIDDEN, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)  # a deleted entry gives its room back when its last reader goes
        self._order = by_length(lengths)
        self._starts = np.empty(len(lengths), dtype=np.int64)
        self._starts[self._order] = np.cumsum(lengths[self._order]) - lengths[self._order]
        self._records = np.empty(int(lengths.max()), self._codec.record(entry.width))
        self._hidden, self._mask = np.empty(0, np.float32), np.empty(0, np.float32)

    @functools.cached_property
    def pooled(self) -> FloatArray:
        """Float32 [n, d]: the mean over real tokens."""
        pooled = np.empty((len(self.lengths), self._width), dtype=np.float32)
        pooled[self._order] = np.fromfile(self.folder / POOLED, np.float32).reshape(pooled.shape)
        return pooled

    def parts(self, groups: Sequence[Indices]) -> Iterator[Part]:
        """Hidden states and masks, as views into one buffer; what pads a sample is zero."""
        for some in groups:
            lengths = self.lengths[some]
            longest = int(lengths.max())
            self._hidden, hidden = _view(self._hidden, (len(some), longest, self._width))
            self._mask, mask = _view(self._mask, (len(some), 1, longest))
            for sample, real, start, length in zip(hidden, mask, self._starts[some], lengths, strict=True):
                self._read(int(start), sample[:length])
                sample[length:] = 0
                real[:, :length], real[:, length:] = 1, 0
            yield hidden, mask

    def chunk(self, groups: Sequence[Indices]) -> list[Part]:
        """Hidden states and masks, copied."""
        return [(hidden.copy(), mask.copy()) for hidden, mask in self.parts(groups)]

    def _read(self, start: int, out: FloatArray) -> None:
        """Read tokens [t, d] from token ``start`` on."""
        records = self._records[: len(out)]
        unread, position = records.view(np.uint8).data, start * records.itemsize
        while unread:
            count = os.preadv(self._file, [unread], position)
            if not count:
                raise FileAccessError(
                    f"{self.folder / HIDDEN} was cut off while it was in use",
                    "check the disk and start again: the entry is computed anew",
                )
            unread, position = unread[count:], position + count
        self._codec.decode(records, out)


def _view(flat: FloatArray, shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """A buffer that is large enough, the old one if it is, and a view of this shape into it."""
    size = math.prod(shape)
    if flat.size < size:
        flat = np.empty(size, dtype=np.float32)
    return flat, flat[:size].reshape(shape)
