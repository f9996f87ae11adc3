"""The mean: what clipping leaves of an update, what a claim counts, and that it stays a sum that can be merged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.server.aggregate import PartialSum
from fleetune.server.job import RuleSettings
from fleetune.server.journal import Accepted, Typical
from fleetune.server.rules.base import Bounds, norm_of, staleness_weight
from fleetune.server.rules.mean import Mean
from support.updates import FAR, Round, Sent, Tensors, tensors

MEAN = RuleSettings()
NAMES = ("blocks.0.query.A", "blocks.1.query.A", "head.bias")


def of_norm(norm: float, *, along: int = 0) -> Tensors:
    values = np.zeros(4, np.float32)
    values[along] = norm
    return {"x": values}


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    """Each device sends some of the tensors, weighs as many samples as it has, and may be late."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    senders = draw(
        st.lists(
            st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(1, 500), st.integers(0, 3)),
            min_size=1,
            max_size=7,
        )
    )
    return Round([Sent(tensors(rng, sorted(names)), samples, late) for names, samples, late in senders])


def plain_mean(some: Round) -> Tensors:
    """The weighted mean without any bounds, by nothing of the rule's."""
    found = {}
    for name in NAMES:
        sent = [update for update in some.updates if name in update.tensors]
        if sent:
            arrays = [update.tensors[name].astype(np.float64) / np.sqrt(1 + update.staleness) for update in sent]
            found[name] = np.average(arrays, axis=0, weights=[update.samples for update in sent]).astype(np.float32)
    return found


@given(rounds(), st.booleans())
def test_where_nobody_reaches_the_bounds_it_is_the_weighted_mean(some: Round, known: bool) -> None:
    gain = some.gain(FAR, Typical(1.0, 1) if known else None)
    expected = plain_mean(some)
    assert gain.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(gain[name], tensor, rtol=1e-5, atol=1e-6)
        assert gain[name].dtype == np.float32


@given(rounds(), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_devices_does_not_show(some: Round, random, known: bool) -> None:  # type: ignore[no-untyped-def]
    typical = Typical(1.0, 20) if known else None
    shuffled = Round(random.sample(some.updates, len(some.updates)))
    gain, other = some.gain(MEAN, typical), shuffled.gain(MEAN, typical)
    assert gain.keys() == other.keys()
    for name, tensor in gain.items():
        np.testing.assert_allclose(other[name], tensor, rtol=1e-6, atol=1e-7)


@given(rounds(), st.integers(1, 4))
def test_partial_sums_of_several_workers_make_the_same_mean(some: Round, workers: int) -> None:
    """Each has some of the updates, and the bounds that all have."""
    typical = Typical(5.0, 20)
    bounds = Bounds(MEAN, typical)
    parts = [PartialSum() for _ in range(workers)]
    for place, (accepted, sent) in enumerate(zip(some.records(), some.updates, strict=True)):
        parts[place % workers].add(sent.tensors, bounds.weight(accepted), scale=bounds.scale(accepted))
    merged = PartialSum()
    for part in parts:
        merged.merge(part)
    gain = some.gain(MEAN, typical)
    assert some.reads == 0
    for name, tensor in merged.mean().items():
        np.testing.assert_allclose(gain[name], tensor, rtol=1e-6, atol=1e-7)


@given(st.floats(1, 1e6), st.integers(3, 9))
def test_one_device_moves_the_mean_by_no_more_than_a_clipped_update(power: float, others: int) -> None:
    honest = [Sent(of_norm(1.0, along=1)) for _ in range(others)]
    gain = Round([*honest, Sent(of_norm(power))]).gain(MEAN)["x"]
    assert gain[0] == pytest.approx(min(power, MEAN.clip) / (others + 1), rel=1e-5)
    assert gain[1] == pytest.approx(others / (others + 1), rel=1e-5)


def test_an_update_is_clipped_to_a_multiple_of_what_was_typical() -> None:
    typical = Typical(norm=3.0, samples=1)
    assert norm_of(Round([Sent(of_norm(60.0))]).gain(MEAN, typical)) == pytest.approx(3 * MEAN.clip)
    np.testing.assert_array_equal(Round([Sent(of_norm(4.4))]).gain(MEAN, typical)["x"], of_norm(4.4)["x"])


def test_clipping_keeps_the_direction_over_all_tensors() -> None:
    sent = {"a": np.array([30, 0], np.float32), "b": np.array([-40], np.float32)}
    gain = Round([Sent(sent)]).gain(MEAN, Typical(norm=1.0, samples=1))
    np.testing.assert_allclose(gain["a"], [0.6 * MEAN.clip, 0], rtol=1e-6)
    np.testing.assert_allclose(gain["b"], [-0.8 * MEAN.clip], rtol=1e-6)


def test_updates_are_read_again_only_where_the_round_before_says_nothing() -> None:
    some = Round([Sent(of_norm(norm)) for norm in (1.0, 2.0, 100.0)])
    for typical, reads in ((None, 3), (Typical(2.0, 1), 0), (Typical(2 / MEAN.clip, 1), 0), (Typical(1.0, 1), 3)):
        before = some.reads
        gain = some.gain(MEAN, typical)["x"]
        assert some.reads - before == reads
        own = reads or typical is None
        limit = MEAN.clip * (2.0 if own else typical.norm)
        assert gain[0] == pytest.approx((1 + min(2, limit) + limit) / 3)


def test_the_first_round_takes_its_own_median() -> None:
    sent = [Sent(of_norm(norm)) for norm in (1.0, 1.0, 2.0, 100.0, 100.0)]
    assert Round(sent).gain(MEAN)["x"][0] == pytest.approx((1 + 1 + 2 + 2 * 2 * MEAN.clip) / 5)


def test_devices_that_learn_ever_more_are_not_held_back_by_the_round_before() -> None:
    """Four honest ones send five times as much as before, and one a hundred times."""
    honest = [Sent(of_norm(5.0)) for _ in range(4)]
    gain = Round([*honest, Sent(of_norm(100.0, along=1))]).gain(MEAN, Typical(1.0, 1))["x"]
    np.testing.assert_allclose(gain[:2], [4.0, MEAN.clip], rtol=1e-6)


def test_one_or_two_devices_do_not_set_their_own_bounds() -> None:
    for count in (1, 2):
        gain = Round([Sent(of_norm(19.0))] * count).gain(MEAN, Typical(1.0, 1))["x"]
        assert gain[0] == pytest.approx(MEAN.clip)


def test_fewer_than_half_cannot_widen_the_bounds() -> None:
    honest = [Sent(of_norm(1.0)) for _ in range(4)]
    gain = Round([*honest, *[Sent(of_norm(19.0, along=1))] * 3]).gain(MEAN, Typical(1.0, 1))["x"]
    np.testing.assert_allclose(gain[:2], [4 / 7, 3 * MEAN.clip / 7], rtol=1e-6)


def test_what_a_device_claims_counts_up_to_a_multiple_of_what_is_typical() -> None:
    honest = [Sent(of_norm(1.0, along=1), samples=20) for _ in range(9)]
    liar = Sent(of_norm(1.0), samples=10**12)
    for typical in (None, Typical(1.0, 20)):
        gain = Round([*honest, liar]).gain(MEAN, typical)["x"]
        assert gain[0] == pytest.approx(MEAN.weight / (9 + MEAN.weight))
    alone = replace(MEAN, weight=1e12)
    assert Round([*honest, liar]).gain(alone)["x"][0] == pytest.approx(1.0)  # without the bound it is all there is


def test_a_late_update_is_clipped_and_then_made_smaller() -> None:
    (record,) = Round([Sent(of_norm(30.0), staleness=3)]).records()
    assert Bounds(MEAN, Typical(3.0, 1)).scale(record) == pytest.approx(MEAN.clip / 10 * staleness_weight(3))
    sent = [Sent(of_norm(30.0), staleness=3), Sent(of_norm(3.0, along=1))]
    gain = Round(sent).gain(MEAN, Typical(3.0, 1))["x"]
    np.testing.assert_allclose(gain[:2], [3 * MEAN.clip * 0.5 / 2, 3 / 2], rtol=1e-6)


def test_a_round_in_which_nothing_changed_is_no_measure() -> None:
    def typical(*sent: Sent) -> Typical | None:
        return Bounds(MEAN).at_closing(Round(sent).records()).typical

    assert typical() is None
    assert typical(Sent(of_norm(0.0), 5), Sent(of_norm(0.0), 9)) is None
    assert typical(Sent(of_norm(0.0), 5), Sent(of_norm(2.0), 9)) == Typical(2.0, 9)
    np.testing.assert_array_equal(Round([Sent(of_norm(0.0))] * 2).gain(MEAN)["x"], np.zeros(4))


def test_a_round_that_nobody_answered_gains_nothing() -> None:
    assert Mean(Bounds(MEAN), load_nothing).gain() == {}


def load_nothing(_accepted: Accepted) -> Tensors:
    raise AssertionError("there is nothing to load")


def test_what_a_round_gained_is_the_same_when_it_is_asked_again() -> None:
    some = Round([Sent(of_norm(1.0)), Sent(of_norm(2.0))])
    rule = Mean(Bounds(MEAN), some.load)
    for record, sent in zip(some.records(), some.updates, strict=True):
        rule.add(record, sent.tensors)
    np.testing.assert_array_equal(rule.gain()["x"], rule.gain()["x"])
