"""Reads the IDX format of MNIST and its relatives, compressed with gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.files import read_pieces

MAX_BYTES = 256 << 20
"""No file of this kind is larger when decompressed; a header that claims more is refused."""

_UNSIGNED_BYTES = 0x08
_REMEDY = "delete the file and fetch the data set again"


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Reads one array of bytes.

    The header is checked before memory is taken, and what follows must be exactly as long as it says.

    Args:
        path: The `.gz` file.
        dimensions: How many axes the array must have.

    Returns:
        The array, uint8, with the shape that the header states.

    Raises:
        DataError: The file is missing, damaged, not of this format, or larger than `MAX_BYTES`.
    """
    try:
        with gzip.open(path, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
                raise DataError(
                    f"{path} is no IDX file of {dimensions} axes of bytes: it starts {header[:4].hex()}",
                    _REMEDY,
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise DataError(f"{path} claims {size} bytes, more than {MAX_BYTES}", _REMEDY)
            content = read_pieces(stream.read, size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", _REMEDY) from error
    if len(content) != size:
        found = f"{len(content)}" if len(content) < size else f"more than {size}"
        raise DataError(f"{path} states the shape {shape} but holds {found} bytes, expected {size}", _REMEDY)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
