"""The frozen weights: a mapped file, quantised or not, turned into float32 only where and while they are used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.protocol.errors import PackError

FloatArray = NDArray[np.float32]

_OF_A_BLOCK = re.compile(r"blocks\.([0-9]{1,4})\.([^.].*)")


class Weights:
    """Reads a pack's weights.

    A quantised tensor ``x`` is stored as ``x.codes`` (``nf4``: two codes a byte, the first in the high half; ``int8``:
    127ths) and ``x.absmax`` (a float32 scale for each ``block_size`` values in row-major order); any other is float32.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._file = TensorFile(path)
        self._path = path
        self._block_size = manifest.quantisation.block_size
        self._pairs: FloatArray | None = None
        self._values_a_byte = 1
        if manifest.quantisation.type == "nf4":
            code, byte = np.asarray(manifest.quantisation.code, dtype=np.float32), np.arange(256)
            if code.shape != (16,):
                raise PackError(f"{path}: its manifest has an NF4 code of {code.size} values", "write the pack again")
            self._pairs = np.stack([code[byte >> 4], code[byte & 15]], axis=1)
            self._values_a_byte = 2
        self._blocks: list[dict[str, str]] = [{} for _ in range(manifest.blocks)]
        self.outer_names: list[str] = []
        for stored in self._file:
            self._check(stored)
            if stored.endswith(".absmax"):
                continue
            name = stored.removesuffix(".codes")
            if name.startswith("blocks."):
                match = _OF_A_BLOCK.fullmatch(name)
                if match is None or int(match[1]) >= manifest.blocks:
                    raise PackError(
                        f"{path} holds {stored[:80]!r}, the manifest has {manifest.blocks} blocks",
                        "write the pack again",
                    )
                self._blocks[int(match[1])][match[2]] = name
            else:
                self.outer_names.append(name)
        if any(block.keys() != self._blocks[0].keys() for block in self._blocks):
            raise PackError(f"{path} does not hold the same tensors for every block", "write the pack again")

    def _check(self, stored: str) -> None:
        """Refuse a tensor that no later step could make numbers of."""
        tensor, why = self._file[stored], ""
        if stored.endswith(".codes"):
            absmax = self._file.get(stored.removesuffix("codes") + "absmax")
            kind = np.dtype(np.uint8 if self._pairs is not None else np.int8)
            values, rows = tensor.size * self._values_a_byte, tensor.shape[:1]
            if tensor.dtype != kind or tensor.ndim != 2:
                why = f"is {tensor.dtype} of rank {tensor.ndim}, not {kind} of rank 2"
            elif absmax is None or absmax.shape[:1] != rows or absmax.size * self._block_size != values:
                why = f"has no scale for each {self._block_size} values"
        elif stored.endswith(".absmax") and stored.removesuffix("absmax") + "codes" not in self._file:
            why = "belongs to no codes"
        elif tensor.dtype != np.float32:
            why = f"is {tensor.dtype}, not float32"
        if why:
            raise PackError(f"{self._path}: tensor {stored[:80]!r} {why}", "write the pack again")

    def outer(self, name: str) -> FloatArray:
        """A float32 tensor from around the blocks.

        Raises:
            PackError: There is none of that name.
        """
        if name not in self._file:
            raise PackError(f"{self._path} holds no {name}", "write the pack again")
        return self._file[name]

    def block(self, index: int, into: Mapping[str, FloatArray] | None = None) -> dict[str, FloatArray]:
        """Dequantise one block.

        Args:
            index: Block, counted from the input.
            into: Matrices to overwrite, as an earlier call returned them, so that nothing is allocated.

        Returns:
            Canonical name → float32 array; matrices are [out, in].
        """
        tensors: dict[str, FloatArray] = {}
        for short, name in self._blocks[index].items():
            if name in self._file:
                tensors[short] = self._file[name]
            else:
                tensors[short] = self._dequantise(name, into[short] if into else None)
        self._file.release()
        return tensors

    def _dequantise(self, name: str, out: FloatArray | None) -> FloatArray:
        codes, absmax = self._file[f"{name}.codes"], self._file[f"{name}.absmax"]
        if out is None:
            out = np.empty((codes.shape[0], codes.shape[1] * self._values_a_byte), dtype=np.float32)
        return self._scale(codes, absmax, out)

    def _scale(self, codes: NDArray[Any], absmax: FloatArray, out: FloatArray) -> FloatArray:
        if self._pairs is not None:
            np.take(self._pairs, codes.reshape(-1), axis=0, out=out.reshape(-1, 2), mode="clip")
        else:
            np.multiply(codes, np.float32(1 / 127), out=out)
        out.reshape(-1, self._block_size)[...] *= absmax.reshape(-1, 1)
        return out

    def count(self, name: str) -> int:
        """Rows of a table.

        Raises:
            PackError: There is none of that name.
        """
        stored = name if name in self._file else f"{name}.codes"
        if stored not in self._file or not self._file[stored].ndim:
            raise PackError(f"{self._path} holds no table {name}", "write the pack again")
        return len(self._file[stored])

    def rows(self, name: str, indices: NDArray[np.int64]) -> FloatArray:
        """Dequantise some rows of a table, such as the embeddings of the tokens of a batch.

        Args:
            name: The table.
            indices: Row numbers, of any shape.

        Returns:
            Float32 of shape [*indices.shape, columns].

        Raises:
            PackError: The table has fewer rows.
        """
        if indices.size and int(indices.max()) >= self.count(name):
            raise PackError(
                f"{self._path}: {name} has {self.count(name)} rows, and row {indices.max()} is asked for",
                "write the pack again",
            )
        if name in self._file:
            table: FloatArray = self._file[name]
            return table[indices]
        flat = indices.reshape(-1)
        codes, absmax = self._file[f"{name}.codes"][flat], self._file[f"{name}.absmax"][flat]
        out = np.empty((len(flat), codes.shape[1] * self._values_a_byte), dtype=np.float32)
        return self._scale(codes, absmax, out).reshape(*indices.shape, -1)
