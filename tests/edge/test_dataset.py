"""A device's data file: good ones are read as they are; a bad one is refused with its line or field."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.files import file_sha256

GOOD = [
    {"text": "a good film", "label": 1, "split": "train"},
    {"text": "dull", "label": 0, "split": "val", "group": "one film"},
    {"text": "the plot is very bad", "label": 0, "split": "test"},
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def pictures(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "images": rng.integers(0, 256, (4, 30, 26), dtype=np.uint8),
        "labels": np.array([0, 2, 1, 0]),
        "split": np.array([0, 1, 2, 0], dtype=np.uint8),
    }
    tensors |= changes
    safetensors.numpy.save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return path


# --- text ---------------------------------------------------------------------------------------------------


def test_a_good_text_file(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", GOOD)
    data = read_dataset(path, tiny_bert_pack)
    assert len(data) == 3
    assert data.labels.tolist() == [1, 0, 0]
    assert data.classes == 2
    assert data.lengths.tolist() == [5, 3, 7]
    assert [data.indices(split).tolist() for split in ("train", "val", "test")] == [[0], [1], [2]]
    assert data.sha256 == file_sha256(path)


def test_the_last_line_needs_no_line_end(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", GOOD)
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_dataset(path, tiny_bert_pack)) == 3


def test_texts_are_embedded_as_torch_does(tiny_bert_pack: Pack, bert_reference: Any, tmp_path: Path) -> None:
    import torch

    data = read_dataset(lines(tmp_path / "data.jsonl", GOOD), tiny_bert_pack)
    found = data.embed(Backbone(tiny_bert_pack, threads=1), np.array([2, 0]))
    vocabulary = (tiny_bert_pack.path / "vocab.txt").read_text().split()
    longest = ["[CLS]", "the", "plot", "is", "very", "bad", "[SEP]"]
    shorter = ["[CLS]", "a", "good", "film", "[SEP]", "[PAD]", "[PAD]"]
    ids = torch.tensor([[vocabulary.index(token) for token in row] for row in (longest, shorter)])
    np.testing.assert_allclose(found, bert_reference.model.embeddings(input_ids=ids).numpy(), atol=1e-5)


@pytest.mark.parametrize(("row", "message"), [
    ("", "line 3: "),
    ("{", "line 3: .*truncated"),
    ("not json", "line 3: .*malformed"),
    ("[]", "line 3: .*object.*array"),
    ({"label": 0, "split": "train"}, "line 3: .*`text`"),
    ({"text": "x", "split": "train"}, "line 3: .*`label`"),
    ({"text": "x", "label": 0}, "line 3: .*`split`"),
    ({"text": 5, "label": 0, "split": "train"}, r"line 3: field text: "),
    ({"text": "x", "label": "good", "split": "train"}, r"line 3: field label: "),
    ({"text": "x", "label": 0.5, "split": "train"}, r"line 3: field label: "),
    ({"text": "x", "label": True, "split": "train"}, r"line 3: field label: "),
    ({"text": "x", "label": None, "split": "train"}, r"line 3: field label: "),
    ({"text": "x", "label": -1, "split": "train"}, "line 3: field label: -1"),
    ({"text": "x", "label": 4096, "split": "train"}, "line 3: field label: 4096"),
    ({"text": "x", "label": 0, "split": "dev"}, r"line 3: field split: .*'dev'"),
    ({"text": "x", "label": 0, "split": "train", "weight": 2}, "line 3: .*weight"),
    ({"text": ["x"], "label": 0, "split": "train"}, "line 3: field text: "),
    ({"text": None, "label": 0, "split": "train"}, "line 3: field text: "),
    ({"text": "x", "label": 1 << 80, "split": "train"}, "line 3: field label: "),
    ('{"text": "x", "label": NaN, "split": "train"}', "line 3: .*malformed"),
    ('{"text": "x", "label": 0, "split": "train"} {}', "line 3: .*malformed"),
    ('{"text": "\ud800", "label": 0, "split": "train"}', "line 3: .*utf-8"),
    (b'{"text": "caf\xe9", "label": 0, "split": "train"}', "line 3: .*utf-8"),
    (b'{"text": "x", "label": 0, "split": "\xff"}', "line 3: .*utf-8"),
    (b'{"\xff": "x", "label": 0, "split": "train"}', "line 3: .*utf-8"),
    (b"\xff\xfe{\x00}\x00", "line 3: .*malformed"),
    (b"\x00" * 40, "line 3: .*malformed"),
    (b"[" * 100_000, "line 3: "),
])  # fmt: skip
def test_a_bad_line_is_named(row: Any, message: str, tiny_bert_pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = [json.dumps(line).encode() for line in GOOD]
    text = row if isinstance(row, str | bytes) else json.dumps(row)
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    path.write_bytes(b"\n".join([*good[:2], raw, good[2]]))
    with pytest.raises(DataError, match=f"{path}, {message}") as caught:
        read_dataset(path, tiny_bert_pack)
    assert caught.value.remedy


def test_a_line_that_is_too_long_is_named_and_not_read_to_its_end(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", GOOD[:2])
    with path.open("ab") as file:
        file.write(b'{"text": "')
        file.truncate(600 << 20)  # and then nothing but zeros: a sparse file
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{path}, line 3: the line is longer than 1048576 bytes"):
        read_dataset(path, tiny_bert_pack)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_long_text_is_cut_to_the_packs_length(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    long = {"text": "good " * 100_000, "label": 1, "split": "train"}
    data = read_dataset(lines(tmp_path / "data.jsonl", [long, *GOOD[1:]]), tiny_bert_pack)
    assert data.lengths.tolist() == [24, 3, 7]


def test_a_file_without_lines_is_empty(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.jsonl is empty"):
        read_dataset(lines(tmp_path / "data.jsonl", []), tiny_bert_pack)


@pytest.mark.parametrize("missing", ["train", "val", "test"])
def test_a_split_without_samples_is_named(missing: str, tiny_bert_pack: Pack, tmp_path: Path) -> None:
    path = lines(tmp_path / "data.jsonl", [row for row in GOOD if row["split"] != missing])
    with pytest.raises(DataError, match=f"{path} has no sample of split '{missing}'"):
        read_dataset(path, tiny_bert_pack)


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
def test_a_good_picture_file(colour: bool, tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (4, 28, 20, 3) if colour else (4, 28, 20), dtype=np.uint8)
    data = read_dataset(pictures(tmp_path / "data.safetensors", images=images), tiny_dinov2_pack)
    assert data.labels.tolist() == [0, 2, 1, 0]
    assert data.classes == 3
    assert data.lengths.tolist() == [5, 5, 5, 5]
    assert [data.indices(split).tolist() for split in ("train", "val", "test")] == [[0, 3], [1], [2]]
    backbone = Backbone(tiny_dinov2_pack, threads=1)
    assert tiny_dinov2_pack.manifest.image is not None
    wanted = backbone.embed(to_patches(images[[2, 0]], tiny_dinov2_pack.manifest.image))
    np.testing.assert_array_equal(data.embed(backbone, np.array([2, 0])), wanted)


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": None}, "field images: expected uint8 of rank 3 or 4"),
    ({"images": np.zeros((4, 30, 26), np.float32)}, "field images: expected uint8 .*, found float32 of rank 3"),
    ({"images": np.full((4, 30, 26), np.nan, np.float64)}, "field images: .*, found float64 of rank 3"),
    ({"images": np.zeros((4, 30, 26), np.int8)}, "field images: .*, found int8 of rank 3"),
    ({"images": np.zeros((4, 30), np.uint8)}, "field images: .*, found uint8 of rank 2"),
    ({"images": np.zeros((4, 1, 28, 28, 3), np.uint8)}, "field images: .*, found uint8 of rank 5"),
    ({"images": np.zeros((4, 28, 28, 4), np.uint8)}, r"field images: pictures of the shape \(28, 28, 4\)"),
    ({"images": np.zeros((4, 3, 28, 28), np.uint8)}, r"field images: pictures of the shape \(3, 28, 28\)"),
    ({"images": np.zeros((4, 0, 28), np.uint8)}, r"field images: pictures of the shape \(0, 28\)"),
    ({"labels": None}, "field labels: expected int64 of rank 1, found nothing"),
    ({"labels": np.zeros(4, np.float32)}, "field labels: .*, found float32 of rank 1"),
    ({"labels": np.full(4, np.nan)}, "field labels: .*, found float64 of rank 1"),
    ({"labels": np.zeros(4, np.int32)}, "field labels: expected int64 of rank 1, found int32 of rank 1"),
    ({"labels": np.zeros(4, np.bool_)}, "field labels: .*, found bool of rank 1"),
    ({"labels": np.zeros((4, 1), np.int64)}, "field labels: .*, found int64 of rank 2"),
    ({"labels": np.array(1)}, "field labels: .*, found int64 of rank 0"),
    ({"labels": np.array([0, -1, 0, 0])}, ", sample 1: field labels: -1 is out of range"),
    ({"labels": np.array([0, 0, 0, 4096])}, ", sample 3: field labels: 4096 is out of range"),
    ({"labels": np.array([0, 0, 0])}, "images has 4 samples, labels has 3 samples, split has 4 samples"),
    ({"split": None}, "field split: expected uint8 of rank 1"),
    ({"split": np.array([0, 1, 2, 0])}, "field split: .*, found int64 of rank 1"),
    ({"split": np.array([0, 1, 3, 2], np.uint8)}, ", sample 2: field split: 3 is out of range"),
    ({"split": np.zeros(5, np.uint8)}, "images has 4 samples, labels has 4 samples, split has 5 samples"),
    ({"split": np.array([0, 0, 1, 1], np.uint8)}, "no sample of split 'test'"),
])  # fmt: skip
def test_a_bad_field_is_named(changes: dict[str, Any], message: str, tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    path = pictures(tmp_path / "data.safetensors", **changes)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_dataset(path, tiny_dinov2_pack)


def test_no_pictures_at_all(tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    empty = {
        "images": np.zeros((0, 28, 28), np.uint8),
        "labels": np.zeros(0, np.int64),
        "split": np.zeros(0, np.uint8),
    }
    with pytest.raises(DataError, match=r"data.safetensors"):
        read_dataset(pictures(tmp_path / "data.safetensors", **empty), tiny_dinov2_pack)


def test_a_damaged_picture_file_is_a_data_error(tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    path = pictures(tmp_path / "data.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"data.safetensors.*its tensors end at byte") as caught:
        read_dataset(path, tiny_dinov2_pack)
    assert "pack" not in caught.value.remedy


# --- where a sample is --------------------------------------------------------------------------------------


def test_samples_are_named_by_line_or_number(tiny_bert_pack: Pack, tiny_dinov2_pack: Pack, tmp_path: Path) -> None:
    texts = read_dataset(lines(tmp_path / "data.jsonl", GOOD), tiny_bert_pack)
    assert texts.where(0) == f"{tmp_path}/data.jsonl, line 1"
    assert texts.where(0, 2) == f"{tmp_path}/data.jsonl, lines 1, 3"
    images = read_dataset(pictures(tmp_path / "data.safetensors"), tiny_dinov2_pack)
    assert images.where(0) == f"{tmp_path}/data.safetensors, sample 0"
    assert images.where(*range(64)).endswith("samples " + ", ".join(map(str, range(20))) + " and 44 more")


def test_rows_that_are_not_finite_name_their_samples(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    data = read_dataset(lines(tmp_path / "data.jsonl", GOOD), tiny_bert_pack)
    rows = np.zeros((4, 2))
    data.check_finite(np.array([2, 0, 1, 2]), rows, "the thing")
    rows[0, 1], rows[3, 0] = np.inf, np.nan
    with pytest.raises(DataError, match=f"{tmp_path}/data.jsonl, line 3: the thing is not finite"):
        data.check_finite(np.array([2, 0, 1, 2]), rows, "the thing")


# --- files --------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_exist_is_named(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/no.jsonl is not a file"):
        read_dataset(tmp_path / "no.jsonl", tiny_bert_pack)


def test_a_folder_is_no_data_file(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        read_dataset(tmp_path, tiny_bert_pack)


def test_another_ending_is_refused(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.csv is neither \.jsonl nor \.safetensors"):
        read_dataset(lines(tmp_path / "data.csv", GOOD), tiny_bert_pack)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    with (tmp_path / "data.jsonl").open("wb") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(DataError, match=r"data.jsonl is larger than 1 GiB"):
        read_dataset(tmp_path / "data.jsonl", tiny_bert_pack)


def test_texts_for_a_vision_pack_and_pictures_for_a_text_pack(
    tiny_bert_pack: Pack, tiny_dinov2_pack: Pack, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"data.jsonl holds text, but the pack"):
        read_dataset(lines(tmp_path / "data.jsonl", GOOD), tiny_dinov2_pack)
    with pytest.raises(DataError, match=r"data.safetensors holds pictures, but the pack"):
        read_dataset(pictures(tmp_path / "data.safetensors"), tiny_bert_pack)
