"""A pack on a device: altered, too large for what is left, crashing, and fine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fleetune.edge.pack.manifest import WEIGHTS_FILE
from fleetune.edge.pack.pack import Pack
from fleetune.tools.doctor.pack import PACK, check_pack


def test_a_whole_pack_trains_a_step(tiny_bert_pack: Pack) -> None:
    found = check_pack(tiny_bert_pack.path)
    assert (found.verdict, found.code) == ("ok", 0), found.found
    assert "a step at depth 1 took" in found.found


def test_a_pack_of_pictures_does_too(tiny_dinov2_pack: Pack) -> None:
    assert check_pack(tiny_dinov2_pack.path).verdict == "ok"


def test_an_altered_pack_is_a_failure_that_names_the_file(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(tiny_bert_pack.path, copy)
    raw = bytearray((copy / WEIGHTS_FILE).read_bytes())
    raw[-1] ^= 1
    (copy / WEIGHTS_FILE).write_bytes(raw)
    found = check_pack(copy)
    assert (found.verdict, found.code) == ("failure", PACK)
    assert WEIGHTS_FILE in found.found
    assert "copy the pack again" in found.fix


def test_a_folder_that_is_no_pack_is_a_failure(tmp_path: Path) -> None:
    found = check_pack(tmp_path)
    assert found.code == PACK
    assert "is not a pack" in found.found


@pytest.mark.parametrize(("limit_mib", "said"), [(24.0, "24 MiB"), (-1.0, "1 MiB")])  # -1: nothing is left
def test_a_step_that_wants_more_than_there_is_ends_alone(tiny_bert_pack: Pack, limit_mib: float, said: str) -> None:
    found = check_pack(tiny_bert_pack.path, limit_mib=limit_mib)
    assert (found.verdict, found.code) == ("failure", PACK)
    assert f"takes more than the {said}" in found.found


def test_a_step_that_crashes_is_told_with_its_signal(
    tiny_bert_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that imports and ends at the first graph."""
    (tmp_path / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    found = check_pack(tiny_bert_pack.path)
    assert found.code == PACK
    assert "SIGILL" in found.found
