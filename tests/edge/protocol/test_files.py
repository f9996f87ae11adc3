"""What is read takes no more memory than there is to read, and no more than was allowed."""

from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.edge.protocol.files import read_bytes, read_pieces, read_rest


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_a_small_file_takes_little_memory_however_large_it_might_be(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(b"x" * 1000)
    assert read_bytes(file, 1 << 30) == b"x" * 1000
    assert peak(lambda: read_bytes(file, 1 << 30)) < 1 << 20


def test_a_file_of_exactly_the_limit_is_read_and_a_larger_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert len(read_bytes(file, 100)) == 100
    with pytest.raises(OSError, match="more than 99 bytes"):
        read_bytes(file, 99)


def test_a_sparse_terabyte_is_refused_without_its_memory(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, 1 << 40)

    def read() -> None:
        with pytest.raises(OSError, match="more than 1000 bytes"):
            read_bytes(file, 1000)

    assert peak(read) < 1 << 20


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe, tmp_path):
        with pytest.raises(OSError, match="no plain file"):
            read_bytes(path, 1000)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing", 1000)


def test_a_file_without_a_size_is_read_to_its_end() -> None:
    assert len(read_bytes(Path("/proc/self/status"), 1 << 20)) > 100


def test_the_rest_of_a_file_is_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    with file.open("rb") as opened:
        opened.seek(4)
        assert peak(lambda: opened.seek(4) and read_rest(opened, 1 << 30)) < 1 << 20
        opened.seek(4)
        assert read_rest(opened, 3) == b"456"
        assert read_rest(opened, 1 << 40) == b"789"
        opened.seek(1 << 40)
        assert read_rest(opened, 5) == b""


def test_a_stream_is_read_piece_by_piece_up_to_its_limit() -> None:
    assert read_pieces(io.BytesIO(b"x" * 1000).read, 1 << 30) == b"x" * 1000
    assert read_pieces(io.BytesIO(b"x" * 1000).read, 10) == b"x" * 10
    assert peak(lambda: read_pieces(io.BytesIO(b"x" * 1000).read, 1 << 30)) < 1 << 20
