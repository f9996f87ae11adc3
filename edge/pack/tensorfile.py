"""A read-only view of a safetensors file that stays on disk.

The safetensors library copies what it reads. A device maps the file instead, so that all processes share the
pages and only those that are touched take memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import UNDECODABLE, PackError

_MAX_HEADER = 4 << 20
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""Every type of the format that NumPy has too."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile(Mapping[str, NDArray[Any]]):
    """Name → read-only array over the mapped bytes.

    Raises:
        PackError: The file is not a well-formed safetensors file; every offset is checked before use.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                head = file.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                    raise self._damaged("its header does not fit the file")
                header = msgspec.json.decode(file.read(length), type=dict[str, Any])
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header.pop("__metadata__", None)
            self._entries = msgspec.convert(header, type=dict[str, _Entry])
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}", "write the pack again") from error
        except UNDECODABLE as error:
            raise self._damaged(str(error)) from error
        self._start = 8 + length
        for name, entry in self._entries.items():
            begin, end = entry.data_offsets
            if entry.dtype not in _DTYPES:
                raise self._damaged(f"tensor {name} has the unknown type {entry.dtype}")
            if any(side < 0 for side in entry.shape):
                raise self._damaged(f"tensor {name} has the shape {list(entry.shape)}")
            expected = math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize
            if not 0 <= begin <= end <= size - self._start or end - begin != expected:
                raise self._damaged(f"tensor {name} does not lie inside the file")

    def _damaged(self, why: str) -> PackError:
        return PackError(f"{self._path} is not a well-formed safetensors file: {why}", "write the pack again")

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._entries[name]
        count = math.prod(entry.shape)
        flat = np.frombuffer(self._map, _DTYPES[entry.dtype], count, self._start + entry.data_offsets[0])
        return flat.reshape(entry.shape)

    def release(self) -> None:
        """Give the mapped pages back: they stay in the system's page cache, but no longer count as this process's."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
