"""A device's own samples, read from a file that its owner wrote and checked line by line."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.pack.manifest import Image
from fleetune.edge.pack.pack import Pack, file_sha256
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import UNDECODABLE, DataError, PackError, field_and_reason

FloatArray = NDArray[np.float32]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_MAX_FILE = 1 << 30
_MAX_CLASSES = 4096


class Dataset(ABC):
    """Labelled samples in three splits.

    Attributes:
        path: The file.
        sha256: Its hash.
        labels: Class of each sample [n].
        lengths: Tokens of each sample [n].
    """

    def __init__(self, path: Path, labels: NDArray[np.int64], splits: NDArray[np.uint8]) -> None:
        self.path = path
        self.sha256 = file_sha256(path)
        self.labels = labels
        self._splits = splits
        for split in SPLITS:
            if not len(self.indices(split)):
                raise DataError(f"{path} has no sample of split {split!r}", 'mark samples as "train", "val" and "test"')

    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def indices(self, split: Split) -> NDArray[np.int64]:
        """Sample numbers of a split."""
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def where(self, index: int) -> str:
        """File and place of a sample, for people."""
        return f"{self.path}, sample {index}"

    @abstractmethod
    def embed(self, backbone: Backbone, indices: NDArray[np.int64]) -> FloatArray:
        """Hidden state [n, t, d] of some samples before the first block, t being the longest of them."""


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    label: int
    split: Split
    group: str | None = None


class TextDataset(Dataset):
    """A JSONL file: ``{"text": "…", "label": 0, "split": "train"}`` on each line.

    Attributes:
        ids: Token ids [n, t], padded to the longest text.
    """

    def __init__(self, path: Path, pack: Pack) -> None:
        text = pack.manifest.text
        if text is None:
            raise DataError(f"{path} holds text, but the pack {pack.path} takes pictures", "use a text pack")
        rows = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    raise DataError(f"{path}, line {number}: the line is empty", "delete it")
                try:
                    row = msgspec.json.decode(line, type=_Row)
                except UNDECODABLE as error:
                    field, reason = field_and_reason(error)
                    raise DataError(
                        f"{path}, line {number}: {f'field {field}: ' if field else ''}{reason}",
                        'write {"text": "…", "label": 0, "split": "train" | "val" | "test"} on each line',
                    ) from error
                if not 0 <= row.label < _MAX_CLASSES:
                    raise DataError(
                        f"{path}, line {number}: field label: {row.label} is out of range", "number the classes from 0"
                    )
                rows.append(row)
        if not rows:
            raise DataError(f"{path} is empty", "write one sample on each line")
        tokeniser = WordPiece(pack.path / text.vocabulary, lowercase=text.lowercase, max_length=text.max_length)
        self.ids, self.lengths = tokeniser.encode_batch([row.text for row in rows])
        labels = np.array([row.label for row in rows], dtype=np.int64)
        super().__init__(path, labels, np.array([SPLITS.index(row.split) for row in rows], dtype=np.uint8))

    def where(self, index: int) -> str:
        """File and line of a sample."""
        return f"{self.path}, line {index + 1}"

    def embed(self, backbone: Backbone, indices: NDArray[np.int64]) -> FloatArray:
        """Hidden state [n, t, d] of some samples before the first block."""
        longest = int(self.lengths[indices].max())
        return backbone.embed(backbone.token_rows(self.ids[indices, :longest]))


class ImageDataset(Dataset):
    """A safetensors file: ``images`` uint8 [n, h, w] or [n, h, w, 3], ``labels`` int64 [n], ``split`` uint8 [n].

    Attributes:
        images: The pictures, mapped.
    """

    def __init__(self, path: Path, pack: Pack) -> None:
        if pack.manifest.image is None:
            raise DataError(f"{path} holds pictures, but the pack {pack.path} takes text", "use a vision pack")
        self._spec: Image = pack.manifest.image
        try:
            file = TensorFile(path)
        except PackError as error:
            raise DataError(error.what, "write images, labels and split with safetensors") from error
        for name, kind, ranks in (("images", "u1", (3, 4)), ("labels", "i8", (1,)), ("split", "u1", (1,))):
            tensor = file.get(name)
            if tensor is None or tensor.dtype != np.dtype(kind) or tensor.ndim not in ranks:
                raise DataError(
                    f"{path}: field {name}: expected {np.dtype(kind)} of rank {' or '.join(map(str, ranks))}",
                    "write images uint8 [n, h, w] or [n, h, w, 3], labels int64 [n], split uint8 [n]",
                )
        self.images, labels, splits = file["images"], file["labels"], file["split"]
        if 0 in self.images.shape[1:] or self.images.shape[3:] not in ((), (3,)):
            raise DataError(
                f"{path}: field images: pictures of the shape {self.images.shape[1:]}",
                "write images uint8 [n, h, w] or [n, h, w, 3]",
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= _MAX_CLASSES))
        if not len(self.images) == len(labels) == len(splits) or splits.max(initial=0) >= len(SPLITS) or len(wrong):
            where = f"sample {wrong[0]} has label {labels[wrong[0]]}" if len(wrong) else "lengths or split codes differ"
            raise DataError(f"{path}: {where}", "give every image one label from 0 and one split: 0, 1 or 2")
        patches = self._spec.size // self._spec.patch
        self.lengths = np.full(len(labels), patches * patches + 1, dtype=np.int64)
        super().__init__(path, labels, splits)

    def embed(self, backbone: Backbone, indices: NDArray[np.int64]) -> FloatArray:
        """Hidden state [n, t, d] of some samples before the first block."""
        return backbone.embed(to_patches(self.images[indices], self._spec))


def read_dataset(path: Path, pack: Pack) -> Dataset:
    """Read a device's data file; ``.jsonl`` is text, ``.safetensors`` pictures.

    Raises:
        DataError: The file is missing, too large or does not fit its schema or the pack.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file", "give the path of a .jsonl or .safetensors file")
    if path.stat().st_size > _MAX_FILE:
        raise DataError(f"{path} is larger than 1 GiB", "give the device fewer samples")
    if path.suffix == ".jsonl":
        return TextDataset(path, pack)
    if path.suffix == ".safetensors":
        return ImageDataset(path, pack)
    raise DataError(f"{path} is neither .jsonl nor .safetensors", "give text as JSONL, pictures as safetensors")
