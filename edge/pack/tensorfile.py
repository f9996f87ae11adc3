"""A read-only view of a safetensors file that stays on disk.

The safetensors library copies what it reads. A device maps the file instead, so that all processes share the
pages and only those that are touched take memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fleetune.edge.protocol.errors import PackError
from fleetune.edge.protocol.header import PREFIX, HeaderError, header_length, parse_header


class TensorFile(Mapping[str, NDArray[Any]]):
    """Name → read-only array over the mapped bytes.

    Raises:
        PackError: The file is not a well-formed safetensors file; every offset is checked before use.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = header_length(file.read(PREFIX), size)
                self._slots = parse_header(file.read(length), size).slots
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PackError(f"{path} cannot be read: {error.strerror}", "write the pack again") from error
        except HeaderError as error:
            raise PackError(f"{path} is not a well-formed safetensors file: {error}", "write the pack again") from error

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._slots[name].array(self._map)

    def release(self) -> None:
        """Give the mapped pages back: they stay in the system's page cache, but no longer count as this process's."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)
