"""Reads CIFAR-10 and CIFAR-100 in the form "for Python", whose files are pickles (decision 19).

A file is opened as what it is only if it is one of the eight that Krizhevsky published: size and MD5 come first. What
then takes the pickle apart calls nothing of NumPy's or of any other module's. It knows three names, and each makes a
plain record of what it was called with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.files import read_bytes

_PIXELS = 3 * 32 * 32
_MAX_BYTES = 160 << 20


@dataclass(frozen=True)
class _Form:
    """One of the two data sets.

    Attributes:
        name: What it is called.
        archive: What its folder comes in.
        classes: How many.
        labels: Key of the labels.
        files: Name of each file → MD5, in lower-case hexadecimal.
    """

    name: str
    archive: str
    classes: int
    labels: bytes
    files: dict[str, str]


FORMS = (
    _Form(
        "cifar-10",
        "cifar-10-python.tar.gz",
        10,
        b"labels",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    _Form(
        "cifar-100",
        "cifar-100-python.tar.gz",
        100,
        b"fine_labels",
        {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    ),
)


def read_cifar(folder: Path) -> tuple[str, int, NDArray[np.uint8], NDArray[np.int64]]:
    """Reads all pictures, those to learn from first.

    Args:
        folder: What ``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz`` unpacks to.

    Returns:
        Name of the data set, number of classes, images uint8 [n, 3, 32, 32], classes int64 [n].

    Raises:
        DataError: The folder is neither of the two, or a file is missing or not the published one.
    """
    form = next((form for form in FORMS if any((folder / file).exists() for file in form.files)), None)
    if form is None:
        known = " nor ".join(f"{form.name}'s {next(iter(form.files))}" for form in FORMS)
        raise DataError(
            f"{folder} has neither {known}",
            f"unpack {' or '.join(form.archive for form in FORMS)} and name the folder that holds its files",
        )
    parts = [_read_file(form, folder / file, md5) for file, md5 in form.files.items()]
    images, labels = zip(*parts, strict=True)
    return form.name, form.classes, np.concatenate(images), np.concatenate(labels)


def _read_file(form: _Form, path: Path, md5: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and classes of one file."""
    remedy = f"unpack {form.archive} again"
    try:
        content = read_bytes(path, _MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", remedy) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path} has MD5 {found}, and {form.name}'s has {md5}", remedy)
    try:
        held = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return _samples(held, form)
    # A pickle is a program: in one that was made to harm, any step can fail in any of these ways.
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError) as error:
        raise DataError(f"{path} is not in the form of {form.name}'s files: {error}", remedy) from error


def _samples(held: object, form: _Form) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and classes of what a file holds.

    Raises:
        TypeError: It is no dictionary with an array and a list.
        ValueError: They are not as many pictures of bytes and as many classes.
    """
    if not isinstance(held, dict):
        raise TypeError(f"it holds no dictionary but a {type(held).__name__}")
    pixels, labels = held.get(b"data"), held.get(form.labels)
    if not isinstance(pixels, _Array) or not isinstance(labels, list):
        raise TypeError(f"it lacks an array 'data' or a list '{form.labels.decode()}'")
    if not all(type(label) is int and 0 <= label < form.classes for label in labels):
        raise ValueError(f"a label is no whole number from 0 to {form.classes - 1}")
    images = pixels.values()
    if len(images) != len(labels):
        raise ValueError(f"it has {len(images)} pictures and {len(labels)} labels")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


class _Type:
    """What a pickle calls as ``numpy.dtype``.

    Args:
        code: Such as ``u1``.
    """

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Bytes have no order, so there is nothing to keep."""


class _Array:
    """What a pickle makes as a NumPy array, as it describes it."""

    def __init__(self) -> None:
        self._state: object = None

    def __setstate__(self, state: object) -> None:
        """Keeps the description."""
        self._state = state

    def values(self) -> NDArray[np.uint8]:
        """Rows of pixels [n, 3072].

        Raises:
            ValueError: Another type or shape is described, or other bytes than so many.
        """
        match self._state:
            case (int(), (int(rows), int(columns)), _Type(code=b"u1"), bool(by_column), bytes(content)) if (
                columns == _PIXELS and rows * columns == len(content)
            ):
                return np.frombuffer(content, dtype=np.uint8).reshape(rows, columns, order="F" if by_column else "C")
        raise ValueError(f"its pictures are no bytes of {_PIXELS} a row")


def _reconstruct(*_: object) -> _Array:
    """What a pickle calls to make an array, before it describes it."""
    return _Array()


_KNOWN: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    """Takes a pickle apart that needs only three names, and gives it none of the things that they are names of."""

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """What a pickle gets for a name.

        Raises:
            pickle.UnpicklingError: For any other name than the three.
        """
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None
