"""A device's own samples, read from a file that its owner wrote and checked line by line."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.pack.manifest import MAX_PICTURE, Image
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.pack.tensorfile import TensorFile
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import UNDECODABLE, DataError, PackError, field_and_reason
from fleetune.edge.protocol.files import file_sha256
from fleetune.edge.protocol.modelfile import MAX_CLASSES

FloatArray = NDArray[np.float32]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_MAX_FILE = 1 << 30
_MAX_LINE = 1 << 20
_MAX_NAMED = 20


class TokenTable(Protocol):
    """Knows the embedding of each token."""

    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [n, t] → [n, t, d]."""
        ...


class Dataset(ABC):
    """Labelled samples in three splits.

    Attributes:
        path: The file.
        sha256: Its hash.
        labels: Class of each sample [n].
        lengths: Tokens of each sample [n].
    """

    def __init__(
        self, path: Path, labels: NDArray[np.int64], splits: NDArray[np.uint8], needed: tuple[Split, ...]
    ) -> None:
        self.path = path
        self.sha256 = file_sha256(path)
        self.labels = labels
        self._splits = splits
        for split in needed:
            if not len(self.indices(split)):
                marks = " and ".join(f'"{name}"' for name in needed)
                raise DataError(f"{path} has no sample of split {split!r}", f"mark samples as {marks}")

    lengths: NDArray[np.int64]
    _noun, _first = "sample", 0

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def indices(self, split: Split) -> NDArray[np.int64]:
        """Sample numbers of a split."""
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def where(self, *indices: int) -> str:
        """File and place of one or several samples, for people."""
        named = ", ".join(str(index + self._first) for index in indices[:_MAX_NAMED])
        more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
        return f"{self.path}, {self._noun}{'s' if len(indices) > 1 else ''} {named}{more}"

    def check_finite(self, indices: NDArray[np.int64], rows: NDArray[Any], what: str) -> None:
        """Refuse samples of which something that was computed is NaN or infinite.

        Args:
            indices: The sample of each row [n].
            rows: What was computed [n, d].
            what: Its name, for people.

        Raises:
            DataError: Names the samples.
        """
        wrong = np.unique(indices[~np.isfinite(rows).all(axis=1)])
        if len(wrong):
            raise DataError(
                f"{self.where(*wrong)}: {what} is not finite",
                "check what is unusual there; if nothing is, training has diverged: lower the learning rate",
                public=f"{what} is not finite",
            )

    def check_labels(self, indices: NDArray[np.int64], classes: int, whose: str, remedy: str) -> None:
        """Refuse samples whose label is none of so many classes.

        Args:
            indices: The samples.
            classes: How many there are.
            whose: Who has them, for people.
            remedy: What to do about it.

        Raises:
            DataError: Names the samples.
        """
        wrong = indices[self.labels[indices] >= classes]
        if len(wrong):
            raise DataError(
                f"{self.where(*wrong)}: field label: {self.labels[wrong].max()} is out of range: "
                f"{whose} has {classes} classes",
                remedy,
                public=f"it has labels beyond the {classes} classes of {whose}",
            )

    @abstractmethod
    def rows(self, tokens: TokenTable, indices: NDArray[np.int64]) -> FloatArray:
        """Token rows or patches [n, t, e] of some samples, t being the longest of them."""

    def embed(self, backbone: Backbone, indices: NDArray[np.int64]) -> FloatArray:
        """Hidden state [n, t, d] of some samples before the first block."""
        return backbone.embed(self.rows(backbone, indices))


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

    _noun, _first = "line", 1

    def __init__(self, path: Path, pack: Pack, needed: tuple[Split, ...] = SPLITS) -> None:
        text = pack.manifest.text
        if text is None:
            raise DataError(f"{path} holds text, but the pack {pack.path} takes pictures", "use a text pack")
        rows = []
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), start=1):
                if len(line) > _MAX_LINE:
                    raise DataError(
                        f"{path}, line {number}: the line is longer than {_MAX_LINE} bytes",
                        "write one sample on each line, and cut long texts: a device reads only the beginning",
                    )
                if not line.strip():
                    raise DataError(f"{path}, line {number}: the line is empty", "delete it")
                try:
                    row = msgspec.json.decode(line, type=_Row)
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8: {error}", "save the file as UTF-8") from error
                except UNDECODABLE as error:
                    field, reason = field_and_reason(error)
                    raise DataError(
                        f"{path}, line {number}: {f'field {field}: ' if field else ''}{reason}",
                        'write {"text": "…", "label": 0, "split": "train" | "val" | "test"} on each line',
                    ) from error
                if not 0 <= row.label < MAX_CLASSES:
                    raise DataError(
                        f"{path}, line {number}: field label: {row.label} is out of range", "number the classes from 0"
                    )
                rows.append(row)
        if not rows:
            raise DataError(f"{path} is empty", "write one sample on each line")
        tokeniser = WordPiece(pack.path / text.vocabulary, lowercase=text.lowercase, max_length=text.max_length)
        self.ids, self.lengths = tokeniser.encode_batch([row.text for row in rows])
        labels = np.array([row.label for row in rows], dtype=np.int64)
        super().__init__(path, labels, np.array([SPLITS.index(row.split) for row in rows], dtype=np.uint8), needed)

    def rows(self, tokens: TokenTable, indices: NDArray[np.int64]) -> FloatArray:
        """Token rows [n, t, d] of some samples."""
        return tokens.token_rows(self.ids[indices, : int(self.lengths[indices].max())])


class ImageDataset(Dataset):
    """A safetensors file: ``images`` uint8 [n, h, w] or [n, h, w, 3], ``labels`` int64 [n], ``split`` uint8 [n].

    Attributes:
        images: The pictures, mapped.
    """

    def __init__(self, path: Path, pack: Pack, needed: tuple[Split, ...] = SPLITS) -> None:
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
                found = "nothing" if tensor is None else f"{tensor.dtype} of rank {tensor.ndim}"
                raise DataError(
                    f"{path}: field {name}: expected {np.dtype(kind)} of rank {' or '.join(map(str, ranks))}, "
                    f"found {found}",
                    "write images uint8 [n, h, w] or [n, h, w, 3], labels int64 [n], split uint8 [n]",
                )
        self.images, labels, splits = file["images"], file["labels"], file["split"]
        sides = self.images.shape[1:3]
        if 0 in sides or max(sides) > MAX_PICTURE or self.images.shape[3:] not in ((), (3,)):
            raise DataError(
                f"{path}: field images: pictures of the shape {self.images.shape[1:]}",
                f"write images uint8 [n, h, w] or [n, h, w, 3], with sides of at most {MAX_PICTURE}",
            )
        counts = {name: len(file[name]) for name in ("images", "labels", "split")}
        if len(set(counts.values())) > 1:
            raise DataError(
                f"{path}: {', '.join(f'{name} has {count} samples' for name, count in counts.items())}",
                "give every image one label and one split",
            )
        for name, values, limit in (("labels", labels, MAX_CLASSES), ("split", splits, len(SPLITS))):
            wrong = np.flatnonzero((values < 0) | (values >= limit))
            if len(wrong):
                raise DataError(
                    f"{path}, sample {wrong[0]}: field {name}: {values[wrong[0]]} is out of range",
                    "number the classes from 0; a split is 0 (train), 1 (val) or 2 (test)",
                )
        patches = self._spec.size // self._spec.patch
        self.lengths = np.full(len(labels), patches * patches + 1, dtype=np.int64)
        super().__init__(path, labels, splits, needed)

    def rows(self, tokens: TokenTable, indices: NDArray[np.int64]) -> FloatArray:
        """Patches [n, t, e] of some samples."""
        del tokens
        return to_patches(self.images[indices], self._spec)


def read_dataset(path: Path, pack: Pack, needed: tuple[Split, ...] = SPLITS) -> Dataset:
    """Read a device's data file; ``.jsonl`` is text, ``.safetensors`` pictures.

    Args:
        path: The file.
        pack: Whose samples they are.
        needed: Splits of which there must be samples.

    Raises:
        DataError: The file is missing, too large or does not fit its schema or the pack.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file", "give the path of a .jsonl or .safetensors file")
    if path.stat().st_size > _MAX_FILE:
        raise DataError(f"{path} is larger than 1 GiB", "give the device fewer samples")
    if path.suffix == ".jsonl":
        return TextDataset(path, pack, needed)
    if path.suffix == ".safetensors":
        return ImageDataset(path, pack, needed)
    raise DataError(f"{path} is neither .jsonl nor .safetensors", "give text as JSONL, pictures as safetensors")
