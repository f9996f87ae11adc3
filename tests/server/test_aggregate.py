"""Weighted means, tensor by tensor, from partial sums that can be merged in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleetune.server.aggregate import PartialSum

NAMES = ("blocks.0.query.A", "blocks.1.query.A", "head.bias")


def total(updates: list[tuple[dict[str, Any], float]]) -> PartialSum:
    partial = PartialSum()
    for tensors, weight in updates:
        partial.add(tensors, weight)
    return partial


@st.composite
def fleets(draw: st.DrawFn) -> list[tuple[dict[str, Any], float]]:
    """Each device sends some of the tensors, and weighs as many samples as it has."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    senders = draw(st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.integers(1, 500)), min_size=1, max_size=6))
    return [({name: rng.standard_normal((2, 3)).astype(np.float32) for name in sorted(sent)}, n) for sent, n in senders]


def test_a_mean_is_weighted_by_samples() -> None:
    one, two = np.array([1, 2], np.float32), np.array([5, -2], np.float32)
    mean = total([({"x": one}, 30), ({"x": two}, 10)]).mean()
    np.testing.assert_allclose(mean["x"], [2, 1])
    assert mean["x"].dtype == np.float32


def test_a_block_is_averaged_over_the_devices_that_trained_it_alone() -> None:
    deep = {"blocks.0.query.A": np.full(2, 8, np.float32), "blocks.1.query.A": np.full(2, 4, np.float32)}
    shallow = {"blocks.1.query.A": np.full(2, 1, np.float32)}
    mean = total([(deep, 10), (shallow, 20)]).mean()
    np.testing.assert_allclose(mean["blocks.0.query.A"], 8)
    np.testing.assert_allclose(mean["blocks.1.query.A"], 2)


def test_a_tensor_that_nobody_sent_is_absent() -> None:
    assert set(total([({"x": np.ones(1, np.float32)}, 1), ({}, 5)]).mean()) == {"x"}
    assert PartialSum().mean() == {}


def test_a_tensor_without_weight_is_absent() -> None:
    assert total([({"x": np.ones(1, np.float32)}, 0)]).mean() == {}


@given(fleets())
def test_the_mean_is_numpys_average(updates: list[tuple[dict[str, Any], float]]) -> None:
    mean = total(updates).mean()
    for name in NAMES:
        sent = [(tensors[name], weight) for tensors, weight in updates if name in tensors]
        assert (name in mean) == bool(sent)
        if sent:
            arrays, weights = zip(*sent, strict=True)
            np.testing.assert_allclose(mean[name], np.average(arrays, axis=0, weights=weights), rtol=1e-5, atol=1e-6)


@given(fleets(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_merging_parts_in_any_order_equals_adding_all_at_once(
    updates: list[tuple[dict[str, Any], float]], random: Any, parts: int
) -> None:
    whole = total(updates).mean()
    shuffled = random.sample(updates, len(updates))
    partials = [total(shuffled[i::parts]) for i in range(parts)]
    random.shuffle(partials)
    merged = PartialSum()
    for partial in partials:
        merged.merge(partial)
    found = merged.mean()
    assert set(found) == set(whole)
    for name, tensor in whole.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_adding_and_merging_leave_their_sources_as_they_were() -> None:
    sent = {"x": np.ones(2, np.float32)}
    part = total([(sent, 2)])
    merged = PartialSum()
    merged.merge(part)
    merged.add({"x": np.full(2, 9, np.float32)}, 2)
    np.testing.assert_allclose(part.mean()["x"], 1)
    np.testing.assert_array_equal(sent["x"], 1)
    np.testing.assert_allclose(merged.mean()["x"], 5)
