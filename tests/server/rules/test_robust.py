"""Rules that leave out what does not fit: trimmed mean, median, Multi-Krum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.server.job import RuleSettings
from fleetune.server.journal import Typical
from fleetune.server.rules import RULES, closing
from fleetune.server.rules.base import assumed
from support.updates import FAR, Round, Sent, Tensors, tensors

NAMES = ("blocks.0.query.A", "blocks.1.query.A", "head.bias")
ROBUST = ("trimmed-mean", "median", "multi-krum")
TYPICAL = Typical(1.0, 1)


def far(name: str, malicious: float = 0.2) -> RuleSettings:
    """A rule whose bounds nobody reaches."""
    return replace(FAR, name=name, malicious=malicious)


def values(*columns: float) -> Round:
    """A round of one number each."""
    return Round([Sent({"x": np.array([value], np.float32)}) for value in columns])


def one(some: Round, settings: RuleSettings) -> float:
    return float(some.gain(settings, TYPICAL)["x"][0])


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    """Devices of different depths: whoever sends a block sends all above it."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    depths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
    return Round([Sent(tensors(rng, NAMES[3 - depth :]), samples=draw(st.integers(1, 99))) for depth in depths])


@pytest.mark.parametrize("name", ROBUST)
@given(some=rounds(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_devices_does_not_show(name: str, some: Round, random: Any) -> None:
    shuffled = Round(random.sample(some.updates, len(some.updates)))
    gain, other = some.gain(far(name)), shuffled.gain(far(name))
    assert gain.keys() == other.keys() == {name for sent in some.updates for name in sent.tensors}
    for tensor_name, tensor in gain.items():
        np.testing.assert_allclose(other[tensor_name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["trimmed-mean", "median"])
@given(
    seed=st.integers(0, 999), honest=st.integers(2, 9), power=st.floats(-1e6, 1e6),
    share=st.sampled_from([0.1, 0.2, 0.3, 0.45]),
)  # fmt: skip
def test_with_fewer_malicious_ones_than_assumed_every_value_lies_between_honest_ones(
    name: str, seed: int, honest: int, power: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    good = [tensors(rng, NAMES) for _ in range(honest)]
    total = next(n for n in range(honest, 99) if n - assumed(share, n, (n - 1) // 2) <= honest)
    bad = [{key: np.full_like(t, power) for key, t in good[0].items()} for _ in range(total - honest)]
    gain = Round([Sent(t) for t in (*bad, *good)]).gain(far(name, share))
    for key, tensor in gain.items():
        stack = np.stack([t[key] for t in good])
        assert (tensor >= stack.min(axis=0) - 1e-6).all()
        assert (tensor <= stack.max(axis=0) + 1e-6).all()


@given(
    seed=st.integers(0, 999), total=st.integers(5, 16), share=st.sampled_from([0.1, 0.2, 0.3, 0.4]),
    together=st.booleans(),
)  # fmt: skip
def test_krum_takes_only_honest_ones_where_more_than_twice_as_many_and_two_are_there(
    seed: int, total: int, share: float, together: bool
) -> None:
    """Honest ones are closer to each other than to those who attack, alone or all with the same update."""
    rng = np.random.default_rng(seed)
    malicious = assumed(share, total, RULES["multi-krum"].tolerates(total))
    assert total > 2 * malicious + 2
    good = [{"head.bias": rng.normal(0, 0.01, 6).astype(np.float32) + 1} for _ in range(total - malicious)]
    ways = rng.normal(size=(malicious, 6))
    far_off = 3 * (ways[:1] if together else ways) / np.linalg.norm(ways[:1] if together else ways, axis=1)[:, None]
    bad = [{"head.bias": far_off[place % max(1, len(far_off))].astype(np.float32)} for place in range(malicious)]
    gain = Round([Sent(t) for t in (*bad, *good)]).gain(far("multi-krum", share))["head.bias"]
    np.testing.assert_allclose(gain, np.mean([t["head.bias"] for t in good], axis=0), rtol=1e-5)


def test_a_trimmed_mean_leaves_out_both_ends() -> None:
    some = values(-1e6, 1, 2, 3, 4, 6, 7, 8, 9, 1e6)
    assert one(some, far("trimmed-mean", 0.1)) == pytest.approx(5.0)
    assert one(some, far("trimmed-mean", 0.45)) == pytest.approx(5.0)  # the two in the middle
    assert one(some, far("trimmed-mean", 0.0)) == pytest.approx(4.0)  # nobody


def test_a_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    assert one(values(1, 5, 100), far("median")) == 5
    assert one(values(1, 5, 7, 100), far("median")) == 6


@pytest.mark.parametrize("name", ROBUST)
def test_samples_do_not_count(name: str) -> None:
    sent = [{"x": np.array([value], np.float32)} for value in (1, 2, 3, 4, 5)]
    some = Round([Sent(tensor, samples=10**9 if place == 4 else 1) for place, tensor in enumerate(sent)])
    assert some.gain(far(name), TYPICAL) == Round([Sent(tensor) for tensor in sent]).gain(far(name), TYPICAL)


@pytest.mark.parametrize("name", ROBUST)
def test_an_update_is_clipped_before_it_is_compared(name: str) -> None:
    """With a single sender there is nothing to compare it with, and clipping alone holds it."""
    big = {"blocks.0.query.A": np.full(4, 1e6, np.float32), "head.bias": np.zeros(1, np.float32)}
    small = {"head.bias": np.full(1, 1.0, np.float32)}
    gain = Round([Sent(big), *[Sent(small)] * 4]).gain(RuleSettings(name=name))
    assert np.linalg.norm(gain["blocks.0.query.A"]) == pytest.approx(RuleSettings().clip, rel=1e-4)


@pytest.mark.parametrize("name", ROBUST)
def test_a_late_update_pulls_less(name: str) -> None:
    def gain(staleness: int) -> float:
        some = [Sent({"x": np.full(1, 4, np.float32)}, staleness=staleness) for _ in range(5)]
        return float(Round(some).gain(far(name), TYPICAL)["x"][0])

    assert gain(0) == pytest.approx(4)
    assert gain(3) == pytest.approx(2)


def test_being_late_does_not_make_an_update_an_outsider_for_krum() -> None:
    """Made smaller before it is compared it would lie by itself, and be left out."""
    rng = np.random.default_rng(0)
    sent = [{"x": (10 + rng.normal(0, 0.1, 8)).astype(np.float32)} for _ in range(7)]
    late = Round([Sent(tensor, staleness=3 if place == 0 else 0) for place, tensor in enumerate(sent)])
    far_off = Sent({"x": np.full(8, 12, np.float32)})
    gain = Round([*late.updates, far_off]).gain(far("multi-krum", 0.1), TYPICAL)["x"]
    np.testing.assert_allclose(
        gain, sum(tensor["x"] * (0.5 if place == 0 else 1) for place, tensor in enumerate(sent)) / 7, rtol=1e-5
    )


def test_krum_judges_every_block_by_itself() -> None:
    """A poisoned block with an honest head: those who train the head alone must not vouch for the block."""
    rng = np.random.default_rng(0)

    def head() -> Tensors:
        return {"head.bias": (1 + rng.normal(0, 0.01, 5)).astype(np.float32)}

    def block(value: float) -> Tensors:
        return {"blocks.1.query.A": (value + rng.normal(0, 0.01, 5)).astype(np.float32)}

    shallow = [Sent(head()) for _ in range(6)]
    deep = [Sent({**block(1.0), **head()}) for _ in range(4)]
    gain = Round([Sent({**block(-2.0), **head()}), *shallow, *deep]).gain(far("multi-krum", 0.2))
    np.testing.assert_allclose(gain["blocks.1.query.A"], 1, atol=0.02)
    np.testing.assert_allclose(gain["head.bias"], 1, atol=0.02)


def test_equal_updates_are_chosen_in_their_order() -> None:
    """Also where matrix products differ in their last bits, as they may from machine to machine."""
    rng = np.random.default_rng(3)
    same = tensors(rng, {"x": (1000,)})
    some = Round([Sent(same) for _ in range(9)])
    np.testing.assert_allclose(some.gain(far("multi-krum"), TYPICAL)["x"], same["x"], rtol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("held", [1, 300, 700])
def test_what_is_held_at_a_time_changes_nothing(name: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    some = Round([Sent(tensors(rng, NAMES[place % 3 :])) for place in range(9)])
    expected, reads = some.gain(far(name)), some.reads
    monkeypatch.setattr(closing, "HELD", held)
    gain = some.gain(far(name))
    assert some.reads - reads > reads  # more than once each
    for key, tensor in expected.items():
        np.testing.assert_allclose(gain[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ROBUST)
def test_of_few_senders_a_rule_makes_the_best(name: str) -> None:
    assert one(values(3.0), far(name)) == 3
    assert one(values(3.0, 5.0), far(name)) == 4


@pytest.mark.parametrize("name", ROBUST)
def test_a_round_that_nobody_answered_gains_nothing(name: str) -> None:
    assert Round([]).gain(far(name)) == {}


def test_every_rule_says_how_many_it_tolerates() -> None:
    found = {name: [rule.tolerates(updates) for updates in (1, 2, 3, 4, 5, 10)] for name, rule in RULES.items()}
    assert found == {
        "mean": [0] * 6,
        "trimmed-mean": [0, 0, 1, 1, 2, 4],
        "median": [0, 0, 1, 1, 2, 4],
        "multi-krum": [0, 0, 0, 0, 1, 3],
    }


def test_a_share_is_rounded_up_to_whole_devices() -> None:
    assert [assumed(0.3, updates, 99) for updates in (1, 3, 4, 10, 20)] == [1, 1, 2, 3, 6]
    assert assumed(0.3, 10, 2) == 2
    assert assumed(0.0, 10, 4) == 0
