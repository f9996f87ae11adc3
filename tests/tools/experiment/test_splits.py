"""Splits: every sample has one client and one purpose, clients differ as they should, and the generator decides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.experiment.splits import (
    Rows,
    dirichlet,
    held_out,
    held_out_subjects,
    natural,
    pathological,
    thinned,
)

Labels = NDArray[np.int64]
Split = Callable[[Labels, int, np.random.Generator], list[Rows]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def labels() -> Labels:
    """3,000 samples of ten classes, in no order."""
    return rng(9).integers(0, 10, 3000)


def spread(labels: Labels, clients: int, source: np.random.Generator) -> list[Rows]:
    return dirichlet(labels, clients, source, alpha=0.5, least=20)


@pytest.mark.parametrize("split", [pathological, spread])
def test_every_sample_has_one_client_and_the_generator_decides_which(split: Split, labels: Labels) -> None:
    dealt = split(labels, 12, rng(1))
    assert len(dealt) == 12
    assert np.sort(np.concatenate(dealt)).tolist() == list(range(3000))
    assert all((np.diff(rows) > 0).all() for rows in dealt)
    again, other = split(labels, 12, rng(1)), split(labels, 12, rng(2))
    assert [rows.tolist() for rows in again] == [rows.tolist() for rows in dealt]
    assert [rows.tolist() for rows in other] != [rows.tolist() for rows in dealt]


@pytest.mark.parametrize(("clients", "each"), [(10, 2), (13, 2), (10, 3), (5, 10), (40, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_client_has_so_many_classes_and_a_class_several_clients(
    clients: int, each: int, seed: int, labels: Labels
) -> None:
    held = [set(labels[rows].tolist()) for rows in pathological(labels, clients, rng(seed), each=each)]
    assert {len(classes) for classes in held} == {each}
    holders = [sum(label in classes for classes in held) for label in range(10)]
    assert min(holders) >= 2
    assert max(holders) - min(holders) <= 1


def test_the_clients_of_a_class_have_uneven_shares_and_none_has_next_to_nothing(labels: Labels) -> None:
    dealt = pathological(labels, 20, rng())
    for label in range(10):
        counts = [count for rows in dealt if (count := int((labels[rows] == label).sum()))]
        assert len(counts) == 4
        assert len(set(counts)) > 1
        assert max(counts) < 1.6 * min(counts)


@pytest.mark.parametrize(("clients", "each"), [(4, 2), (9, 2), (10, 1), (10, 11), (1, 10)])
def test_classes_that_do_not_go_round_are_refused_with_a_number_that_would(
    clients: int, each: int, labels: Labels
) -> None:
    with pytest.raises(ConfigError, match=f"{each} classes") as caught:
        pathological(labels, clients, rng(), each=each)
    assert "choose from 2 to 10" in caught.value.remedy or f"{-(-20 // each)} clients or more" in caught.value.remedy


def test_the_smaller_alpha_the_more_clients_differ(labels: Labels) -> None:
    def largest(alpha: float) -> float:
        dealt = dirichlet(labels, 5, rng(), alpha=alpha, least=10)
        return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in dealt]))

    assert largest(0.1) > largest(1) + 0.1 > largest(100) + 0.2
    assert largest(1000) < 0.15


def test_each_client_has_the_least_that_was_asked_for_and_two_classes(labels: Labels) -> None:
    for seed in range(10):
        dealt = dirichlet(labels, 10, rng(seed), alpha=0.1, least=100)
        assert min(len(rows) for rows in dealt) >= 100
    halves = labels % 2
    for seed in range(10):
        dealt = dirichlet(halves, 3, rng(seed), alpha=0.1, least=10)
        assert {len(np.unique(halves[rows])) for rows in dealt} == {2}


def test_what_no_draw_gives_is_refused(labels: Labels) -> None:
    with pytest.raises(
        ConfigError, match=r"alpha 0\.01 none of 1000 draws gave each of 20 clients 140 of 3000 samples"
    ):
        dirichlet(labels, 20, rng(), alpha=0.01, least=140)


@pytest.mark.parametrize("alpha", [0, -1, 1e-9, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha: float, labels: Labels) -> None:
    with pytest.raises(ConfigError, match="alpha is"):
        dirichlet(labels, 5, rng(), alpha=alpha, least=1)


def test_natural_clients_are_the_groups() -> None:
    assert [rows.tolist() for rows in natural(np.array([2, 0, 2, 1, 0]))] == [[1, 4], [3], [0, 2]]


@pytest.mark.parametrize(
    "counts", [(100, 100), (8, 5, 1), (2, 1), (2, 2, 2, 2, 2), (1, 1), (7, 93), (3, 3, 3, 3, 3, 3)]
)
def test_a_fifth_of_a_clients_samples_is_held_out_of_every_class(counts: tuple[int, ...]) -> None:
    own = rng(3).permutation(np.repeat(np.arange(len(counts)), counts))
    out = held_out(own, rng())
    for label, count in enumerate(counts):
        kept = int((~out & (own == label)).sum())
        assert kept >= 1
        assert abs(kept - 0.8 * count) <= 1
    if min(counts) > 1:
        assert abs(out.sum() - 0.2 * len(own)) <= 0.5
    assert (held_out(own, rng()) == out).all()


def test_which_samples_are_held_out_is_chance() -> None:
    own = np.zeros(100, dtype=np.int64)
    assert (held_out(own, rng(1)) != held_out(own, rng(2))).any()


def test_a_subject_is_learned_from_or_measured_by_never_both() -> None:
    source = rng(5)
    subjects = source.integers(0, 300, 2000)
    classes = subjects % 4
    out = held_out_subjects(subjects, classes, rng())
    assert not set(subjects[out].tolist()) & set(subjects[~out].tolist())
    for label in range(4):
        assert out[classes == label].mean() == pytest.approx(0.2, abs=0.01)
    assert (held_out_subjects(subjects, classes, rng()) == out).all()
    assert (held_out_subjects(subjects, classes, rng(1)) != out).any()


def test_a_subject_larger_than_a_fifth_is_learned_from() -> None:
    subjects = np.array([0] * 30 + [*range(1, 71)])
    for seed in range(10):
        out = held_out_subjects(subjects, np.zeros(100, dtype=np.int64), rng(seed))
        assert not out[:30].any()
        assert out.sum() == 20


def test_thinning_keeps_the_shares_of_classes() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    rows = np.arange(0, 1000, 2)
    kept = thinned(rows, labels, 50, rng())
    assert np.bincount(labels[kept]).tolist() == [30, 15, 5]
    assert set(kept.tolist()) < set(rows.tolist())
    assert (np.diff(kept) > 0).all()
    assert thinned(rows, labels, 500, rng()).tolist() == rows.tolist()
