"""What is unpacked from an archive that may come from anybody, and what is not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import SignatureError
from fleetune.tools.trees import extract, tree_digest, write_tar_gz


def pack(file: Path, *entries: tuple[str, str]) -> Path:
    """An archive of files, and of links where an entry begins with ``->``."""
    with tarfile.open(file, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, what in entries:
            entry = tarfile.TarInfo(name)
            if what.startswith("->"):
                entry.type, entry.linkname = tarfile.SYMTYPE, what.removeprefix("->")
            entry.size = 0 if entry.issym() else len(what)
            archive.addfile(entry, io.BytesIO(what.encode()))
    return file


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    tree = tmp_path / "tree"
    tree.mkdir()
    return tree


@pytest.mark.parametrize(
    "entries",
    [
        [("lib", "->../elsewhere"), ("lib/word", "x")],
        [("a/lib", "->../../elsewhere"), ("a/lib/deeper/word", "x")],
        [("lib", "x"), ("lib/word", "x")],
        [("lib", "->../elsewhere/word"), ("lib", "x")],
        [("../elsewhere/word", "x")],
        [("a/../../elsewhere/word", "x")],
        [("/elsewhere/word", "x")],
        [("word", "x"), ("word", "y")],
        [("n" * 256, "x")],
    ],
)
def test_nothing_is_written_elsewhere_or_twice(entries: list[tuple[str, str]], tree: Path) -> None:
    archive = pack(tree.parent / "x.tar.gz", *entries)
    with pytest.raises(SignatureError, match=r"x\.tar\.gz: "):
        extract(archive, tree)
    assert list((tree.parent / "elsewhere").iterdir()) == []


def test_a_link_may_lead_out(tree: Path) -> None:
    extract(pack(tree.parent / "x.tar.gz", ("bin/python3", "->/usr/bin/python3")), tree)
    assert (tree / "bin/python3").readlink() == Path("/usr/bin/python3")


def test_a_tree_comes_back_as_it_was(tree: Path) -> None:
    (tree / "bin/deeper").mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "bin/deeper/program").write_bytes(b"#!/bin/sh\n")
    (tree / "bin/deeper/program").chmod(0o755)
    (tree / "word").write_bytes(b"word")
    (tree / "word").chmod(0o644)
    write_tar_gz(tree, tree.parent / "x.tar.gz")
    again = tree.parent / "again"
    again.mkdir()
    extract(tree.parent / "x.tar.gz", again)
    assert tree_digest(again) == tree_digest(tree)
    extract(tree.parent / "x.tar.gz", tree.parent / "new/below", below="bin/deeper")
    assert [path.name for path in (tree.parent / "new/below").iterdir()] == ["program"]
