"""An experiment's data: each sample is in one place, and what cannot be learned from is refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fleetune.edge.protocol.errors import ConfigError, DataError
from fleetune.tools.experiment.base import Federation, Samples
from fleetune.tools.experiment.data import Origins, Pictures, deal, emoji_8, fashion_mnist, read_pictures

SAMPLES, SUBJECTS, SOURCES = 2400, 200, ("north", "south", "east")


def numbered(origins: bool = True) -> Pictures:
    """Pictures that show their own number; each source has each of 200 subjects, of five classes, four times."""
    images = np.zeros((SAMPLES, 3, 32, 32), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(SAMPLES), 256)
    subject = np.arange(SAMPLES) // 3 % SUBJECTS
    own = Origins(SOURCES, np.arange(SAMPLES) % 3, subject) if origins else None
    return Pictures("numbers", 5, images, subject % 5, own)


def numbers(samples: Samples) -> list[int]:
    return (samples.images[:, 0, 0, 0].astype(int) * 256 + samples.images[:, 0, 0, 1]).tolist()


def rows(federation: Federation) -> tuple[list[int], list[int]]:
    """What all clients learn from, and what they are measured by."""
    train = [number for client in federation.clients for number in numbers(client.train)]
    return train, [number for client in federation.clients for number in numbers(client.test)]


CASES: list[Mapping[str, object]] = [
    {"split": "natural"},
    {"split": "pathological", "clients": 6},
    {"split": "pathological", "clients": 5, "each": 4},
    {"split": "dirichlet", "clients": 6, "alpha": 0.5},
]


@pytest.mark.parametrize("origins", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sample_is_in_one_place_and_a_fifth_of_them_measures(case: Mapping[str, object], origins: bool) -> None:
    if case["split"] == "natural" and not origins:
        with pytest.raises(ConfigError, match="nobody knows where the samples of numbers come from"):
            deal(numbered(origins), **case)
        return
    pictures = numbered(origins)
    federation = deal(pictures, **case, seed=4, batch=16)
    assert (federation.data, federation.split, federation.classes) == ("numbers", case["split"], 5)
    train, test = rows(federation)
    assert sorted(train + test) == list(range(SAMPLES))
    assert len(test) == pytest.approx(SAMPLES / 5, abs=20)
    for client in federation.clients:
        for part in (client.train, client.test):
            assert part.labels.tolist() == pictures.labels[numbers(part)].tolist()
            assert part.labels.dtype == np.int64
            assert part.images.shape == (len(part.labels), 3, 32, 32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_client_learns_from_a_subject_that_any_is_measured_by(case: Mapping[str, object]) -> None:
    pictures = numbered()
    assert pictures.origins is not None
    found = []
    for seed in (0, 0, 1):
        train, test = rows(deal(pictures, **case, seed=seed, batch=16))
        assert not set(pictures.origins.subject[train].tolist()) & set(pictures.origins.subject[test].tolist())
        found.append((train, test))
    assert found[0] == found[1] != found[2]


def test_the_subjects_to_measure_by_are_the_same_in_every_split() -> None:
    tests = [set(rows(deal(numbered(), **case, seed=2, batch=16))[1]) for case in CASES]
    assert all(test == tests[0] for test in tests)


def test_natural_clients_are_the_sources() -> None:
    federation = deal(numbered(), "natural", clients=3)
    assert [client.name for client in federation.clients] == list(SOURCES)
    for place, client in enumerate(federation.clients):
        assert {number % 3 for number in numbers(client.train) + numbers(client.test)} == {place}


@pytest.mark.parametrize("origins", [False, True])
def test_a_limit_leaves_fewer_of_the_same_samples(origins: bool) -> None:
    whole = deal(numbered(origins), "pathological", clients=5, seed=3)
    limited = deal(numbered(origins), "pathological", clients=5, seed=3, limit=100)
    for all_, few in zip(whole.clients, limited.clients, strict=True):
        assert (len(few.train.labels), len(few.test.labels)) == (80, 20)
        assert set(numbers(few.train)) < set(numbers(all_.train))
        assert set(numbers(few.test)) < set(numbers(all_.test))
        assert len(set(few.train.labels.tolist())) == 2


@pytest.mark.parametrize(
    ("options", "says", "remedy"),
    [
        (
            {"limit": 70},
            "client-1 has 56 samples to learn from, of 2 classes.*less than a batch of 64",
            "raise the limit",
        ),
        ({"clients": 60}, "client-1 has .* less than a batch of 64", "fewer clients"),
        ({"batch": 2000}, "client-1 has .* less than a batch of 2000", "make the batch smaller"),
        ({"limit": 0}, "limit is 0", "at least a batch"),
        ({"limit": 2, "batch": 1}, "client-1 has 2 samples .* 0 to measure by: its accuracy", "raise the limit"),
        ({"seed": -1}, "seed is -1", "0 or more"),
        ({"clients": None}, "cannot be made for no clients", "1 or more"),
        ({"clients": -2}, "cannot be made for -2 clients", "1 or more"),
        ({"split": "iid"}, "no split 'iid'", "pathological, dirichlet, natural"),
        ({"split": "natural"}, "comes from 3 sources, which are no 10 clients", "3 clients"),
    ],
)
def test_what_could_not_be_learned_from_is_refused(options: Mapping[str, object], says: str, remedy: str) -> None:
    given = {"split": "pathological", "clients": 10, **options}
    with pytest.raises(ConfigError, match=says) as caught:
        deal(numbered(), **given)
    assert remedy in caught.value.remedy


def test_a_client_with_one_class_is_refused() -> None:
    pictures = numbered()
    assert pictures.origins is not None
    alone = Pictures(
        "numbers", 5, pictures.images, np.where(pictures.origins.source == 1, 3, pictures.labels), pictures.origins
    )
    with pytest.raises(ConfigError, match=r"south has \d+ samples to learn from, of 1 class, .*nothing to learn"):
        deal(alone, "natural")


# --- data sets


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def test_grey_pictures_get_a_margin_and_three_equal_colours(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(1, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    for part, some in (("train", slice(3)), ("t10k", slice(3, 5))):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images[some]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[some]))
    pictures = fashion_mnist(tmp_path)
    assert (pictures.data, pictures.classes) == ("fashion-mnist", 10)
    samples = pictures.take(np.array([0, 4]))
    assert samples.labels.tolist() == [3, 5]
    assert samples.images.shape == (2, 3, 32, 32)
    for colour in range(3):
        assert (samples.images[:, colour, 2:30, 2:30] == images[[0, 4]]).all()
    assert (samples.images.astype(int).sum(axis=(1, 2, 3)) == 3 * images[[0, 4]].astype(int).sum(axis=(1, 2))).all()


def test_a_folder_without_fashion_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/train-images"):
        fashion_mnist(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path} holds no Emoji-8"):
        emoji_8(tmp_path)


def test_a_folder_is_taken_for_cifar_and_another_word_for_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} has neither cifar-10's data_batch_1"):
        read_pictures(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="neither a data set nor a folder 'mnist'") as caught:
        read_pictures("mnist")
    assert "fashion-mnist or emoji-8" in caught.value.remedy
