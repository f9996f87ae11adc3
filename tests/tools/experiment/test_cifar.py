"""CIFAR's files: read as what they are, refused when they are anything else, and nothing in one is ever run."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import DataError
from fleetune.tools.experiment import cifar
from fleetune.tools.experiment.cifar import FORMS, read_cifar

Pixels = NDArray[np.uint8]


class Raw(bytes):
    """Operations that stand in a pickle as they are."""


def pickled(value: object) -> bytes:
    """Operations of protocol 2, as Python 2 wrote them: its strings are bytes, in operations of their own."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, bytes):
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    assert isinstance(value, dict)
    return b"}(" + b"".join(pickled(key) + pickled(item) for key, item in value.items()) + b"u"


def array(rows: int, columns: int, content: bytes, code: bytes = b"u1", by_column: bool = False) -> Raw:
    """A NumPy array, as NumPy of 2009 described it."""
    kind = b"cnumpy\ndtype\n(" + pickled(code) + b"K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + pickled(rows) + pickled(columns) + b"t"
    state = b"(K\x01" + shape + kind + (b"\x88" if by_column else b"\x89") + pickled(content) + b"tb"
    return Raw(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR" + state)


def file_of(value: object) -> bytes:
    return b"\x80\x02" + pickled(value) + b"."


def pixels(first: int, rows: int) -> Pixels:
    """Pictures of which each starts with its number."""
    made = np.random.default_rng(first).integers(0, 256, (rows, 3072), dtype=np.uint8)
    made[:, 0] = np.arange(first, first + rows)
    return made


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, bytes], None]:
    """Writes a file and makes it the published one."""

    def write(path: Path, content: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        form = next(form for form in FORMS if path.name in form.files)
        monkeypatch.setitem(form.files, path.name, hashlib.md5(content, usedforsecurity=False).hexdigest())

    return write


Publish = Callable[[Path, bytes], None]


@pytest.fixture
def ten(tmp_path: Path, publish: Publish) -> Path:
    """CIFAR-10 of two pictures a file, from 0 on in the order of the files."""
    for place, name in enumerate(FORMS[0].files):
        content = {
            b"batch_label": b"a batch",
            b"labels": [place, 9 - place],
            b"data": array(2, 3072, pixels(2 * place, 2).tobytes()),
            b"filenames": [b"a.png", b"b.png"],
        }
        publish(tmp_path / "ten" / name, file_of(content))
    return tmp_path / "ten"


def test_cifar_10_is_read_file_by_file(ten: Path) -> None:
    name, classes, images, labels = read_cifar(ten)
    assert (name, classes) == ("cifar-10", 10)
    assert images.dtype == np.uint8
    assert images.shape == (12, 3, 32, 32)
    assert images[:, 0, 0, 0].tolist() == list(range(12))
    assert (images[2:4].reshape(2, 3072) == pixels(2, 2)).all()
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4]


@pytest.mark.parametrize("by_column", [False, True])
def test_cifar_100_has_its_fine_labels(by_column: bool, tmp_path: Path, publish: Publish) -> None:
    for name, first in (("train", 0), ("test", 3)):
        made = pixels(first, 3)
        content: Mapping[bytes, object] = {
            b"fine_labels": [99, 50, first],
            b"coarse_labels": [1, 2, 3],
            b"data": array(3, 3072, made.tobytes("F" if by_column else "C"), by_column=by_column),
        }
        publish(tmp_path / name, file_of(content))
    name, classes, images, labels = read_cifar(tmp_path)
    assert (name, classes) == ("cifar-100", 100)
    assert (images.reshape(6, 3072) == np.concatenate([pixels(0, 3), pixels(3, 3)])).all()
    assert labels.tolist() == [99, 50, 0, 99, 50, 3]


def test_a_file_that_is_not_the_published_one_is_named(ten: Path) -> None:
    path = ten / "data_batch_3"
    expected = FORMS[0].files[path.name]
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    with pytest.raises(DataError, match=f"{path} has MD5 {found}, .*{expected}") as caught:
        read_cifar(ten)
    assert caught.value.remedy == "unpack cifar-10-python.tar.gz again"


def test_a_file_that_is_missing_or_too_large_is_named(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match=f"{ten / 'data_batch_1'} cannot be read: more than 1000 bytes"):
        read_cifar(ten)
    monkeypatch.undo()
    (ten / "data_batch_1").unlink()
    with pytest.raises(DataError, match=f"{ten / 'data_batch_1'} cannot be read: No such file"):
        read_cifar(ten)


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=f"{tmp_path} has neither") as caught:
        read_cifar(tmp_path)
    assert "cifar-10-python.tar.gz or cifar-100-python.tar.gz" in caught.value.remedy


def calls(module: str, name: str, argument: bytes) -> Raw:
    """Operations that call a function with a text."""
    text = b"X" + struct.pack("<I", len(argument)) + argument
    return Raw(b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + text + b"tR")


class Touch:
    """What Python itself would make of a pickle that does harm."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_command_in_a_pickle_is_never_run(protocol: int, tmp_path: Path, ten: Path, publish: Publish) -> None:
    mark = tmp_path / "mark"
    harm = pickle.dumps([Touch(mark)], protocol)
    pickle.loads(harm)  # noqa: S301 - it does what it is here for
    assert mark.exists()
    mark.unlink()
    publish(ten / "data_batch_2", harm)
    with pytest.raises(DataError, match=f"{ten / 'data_batch_2'} is not in the form .*: it asks for .*system"):
        read_cifar(ten)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy", "ndarray.tofile"),
        ("_codecs", "encode"),
        ("copyreg", "_reconstructor"),
        ("fleetune.tools.experiment.cifar", "Path"),
    ],
)
def test_no_name_is_known_but_the_three(module: str, name: str, ten: Path, publish: Publish) -> None:
    publish(ten / "test_batch", file_of({b"labels": [0], b"data": calls(module, name, b"x")}))
    with pytest.raises(DataError, match=f"asks for {module}.{name}"):
        read_cifar(ten)


GOOD = array(1, 3072, bytes(3072))


@pytest.mark.parametrize(
    "held",
    [
        [1, 2],
        {},
        {b"data": GOOD},
        {b"labels": [1]},
        {b"data": GOOD, b"labels": [10]},
        {b"data": GOOD, b"labels": [-1]},
        {b"data": GOOD, b"labels": [b"1"]},
        {b"data": GOOD, b"labels": [1, 2]},
        {b"data": GOOD, b"labels": b"1"},
        {b"data": bytes(3072), b"labels": [1]},
        {b"data": array(1, 3072, bytes(3071)), b"labels": [1]},
        {b"data": array(1, 3071, bytes(3071)), b"labels": [1]},
        {b"data": array(2, 1536, bytes(3072)), b"labels": [1, 1]},
        {b"data": array(-1, 3072, bytes(3072)), b"labels": [1]},
        {b"data": array(2**30, 3072, bytes(3072)), b"labels": [1]},
        {b"data": array(1, 3072, bytes(3072), code=b"O8"), b"labels": [1]},
        {b"data": Raw(b"cnumpy.core.multiarray\n_reconstruct\n(tR"), b"labels": [1]},
        {b"data": Raw(b"cnumpy\nndarray\n"), b"labels": [1]},
        {b"data": Raw(b"cnumpy\ndtype\n(tR"), b"labels": [1]},
        Raw(b"00"),
        Raw(b"h\x07"),
        Raw(b""),
    ],
    ids=str,
)
def test_what_is_not_pictures_and_classes_is_refused(held: object, ten: Path, publish: Publish) -> None:
    publish(ten / "data_batch_5", file_of(held))
    with pytest.raises(DataError, match=f"{ten / 'data_batch_5'} is not in the form of cifar-10's files"):
        read_cifar(ten)


def test_a_file_that_breaks_off_is_refused(ten: Path, publish: Publish) -> None:
    whole = (ten / "data_batch_4").read_bytes()
    for length in (0, 1, 2, 50, len(whole) // 2, len(whole) - 1):
        publish(ten / "data_batch_4", whole[:length])
        with pytest.raises(DataError, match="data_batch_4 is not in the form"):
            read_cifar(ten)
