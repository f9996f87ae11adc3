"""pFedMoE as in its paper, on a few pictures that are easy to tell apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'fleetune[pack]'")

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.experiment.base import Client, Federation, Hyper, Samples
from fleetune.tools.experiment.pfedmoe import PFedMoE, Weighing
from fleetune.tools.pack.extractors import CNNS

MODELS = [CNNS["cnn-5"], CNNS["cnn-4"], CNNS["cnn-5"]]
HYPER = Hyper(epochs=1, batch=8, learning_rate=0.1, seed=3)


def samples(rng: np.random.Generator, count: int, classes: tuple[int, int]) -> Samples:
    """Noise with a bright quarter; which one it is is the class."""
    labels = rng.choice(classes, count).astype(np.int64)
    images = rng.integers(0, 90, (count, 3, 32, 32)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 120
    return Samples(images, labels)


@pytest.fixture(scope="module")
def federation() -> Federation:
    rng, sizes = np.random.default_rng(0), (25, 17, 33)  # a last batch of one for every client
    clients = tuple(
        Client(f"c{i}", samples(rng, size, classes), samples(rng, 20, classes))
        for i, (size, classes) in enumerate(zip(sizes, ((0, 1), (1, 2), (2, 3)), strict=True))
    )
    return Federation("quarters", "by hand", 4, clients)


def test_clients_with_different_networks_learn(federation: Federation) -> None:
    method = PFedMoE(federation, MODELS, HYPER)
    before = np.mean(method.accuracies())
    for _ in range(10):
        method.play([0, 1, 2])
    found = method.accuracies()
    assert len(found) == 3
    assert np.mean(found) > max(0.85, before)


def test_only_the_extractor_goes_up_and_down(federation: Federation) -> None:
    assert PFedMoE(federation, MODELS, HYPER).play([0, 2]).sent == 2 * 2 * 665_048


def test_the_new_extractor_is_the_mean_over_who_took_part_weighted_by_samples(federation: Federation) -> None:
    def alone(number: int) -> Any:
        method = PFedMoE(federation, MODELS, HYPER)
        method.play([number])
        return method.shared.vector.astype(np.float64)

    together = PFedMoE(federation, MODELS, HYPER)
    together.play([0, 2])
    wanted = (25 * alone(0) + 33 * alone(2)) / 58
    np.testing.assert_allclose(together.shared.vector, wanted, atol=1e-6)


def test_who_is_not_asked_stays_as_it_is(federation: Federation) -> None:
    method, other = PFedMoE(federation, MODELS, HYPER), PFedMoE(federation, MODELS, HYPER)
    method.play([0, 2])
    assert method.accuracies()[1] == other.accuracies()[1]


def test_the_same_seed_gives_the_same(federation: Federation) -> None:
    runs = []
    for _ in range(2):
        method = PFedMoE(federation, MODELS, HYPER)
        method.play([0, 1, 2])
        runs.append((method.accuracies(), method.shared.vector.copy()))
    assert runs[0][0] == runs[1][0]
    np.testing.assert_allclose(runs[0][1], runs[1][1], atol=1e-6)


@pytest.mark.parametrize("own", [Weighing(gate="fixed"), Weighing(gate="element"), Weighing(held_out=0.25)])
def test_options_learn_too(own: Weighing, federation: Federation) -> None:
    method = PFedMoE(federation, MODELS, HYPER, own)
    for _ in range(10):
        method.play([0, 1, 2])
    assert np.mean(method.accuracies()) > 0.85


def test_what_is_shared_has_a_step_size_of_its_own(federation: Federation) -> None:
    moved = []
    for rate in (None, 0.1, 0.01):  # the first two are the same
        method = PFedMoE(federation, MODELS, replace(HYPER, shared_learning_rate=rate))
        before = method.shared.vector.copy()
        method.play([0, 1, 2])
        moved.append(float(np.linalg.norm(method.shared.vector - before)))
    assert moved[0] == pytest.approx(moved[1])
    assert 0 < moved[2] < 0.3 * moved[0]


def test_a_gate_that_hardly_moves_weighs_both_alike(federation: Federation) -> None:
    method, fixed = (
        PFedMoE(federation, MODELS, replace(HYPER, gate_learning_rate=1e-9)),
        PFedMoE(federation, MODELS, HYPER, Weighing(gate="fixed")),
    )
    for one in (method, fixed):
        one.play([0, 1, 2])
    np.testing.assert_allclose(method.shared.vector, fixed.shared.vector, atol=1e-4)


def test_a_loss_that_is_no_number_ends_it_and_says_whose(federation: Federation) -> None:
    method = PFedMoE(federation, MODELS, Hyper(epochs=20, batch=8, learning_rate=1e6))
    with (
        np.errstate(all="ignore"),
        pytest.raises(ConfigError, match="PFedMoE diverged in round 1: the loss of client c0"),
    ):
        method.play([0, 1, 2])
