"""Error feedback: what a coarse codec loses arrives with a later round, and none of it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.edge.agent.feedback import Feedback
from fleetune.edge.agent.state import JobStore
from fleetune.edge.protocol.codec import Codec, Tensors
from fleetune.edge.protocol.errors import MessageError

INT4 = Codec.named("int4")
SHAPES = {"blocks.2.query.A": (32, 4), "head.weight": (32, 2), "head.bias": (3,)}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "fedms", "r", "fedms")


def updates(rounds: int) -> list[Tensors]:
    """Small steps in a direction that stays, as a round's are, and some noise."""
    rng = np.random.default_rng(0)
    drift = {name: 0.01 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return [
        {name: (drift[name] + 0.002 * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(rounds)
    ]


def total(tensors: list[Tensors]) -> dict[str, Any]:
    return {name: np.sum([some[name] for some in tensors], axis=0, dtype=np.float64) for name in tensors[0]}


def apart(one: dict[str, Any], two: dict[str, Any]) -> float:
    return max(float(np.abs(one[name] - two[name]).max()) for name in two)


def send(store: JobStore, some: Tensors, version: int, answered: int | None = None) -> Tensors:
    """What arrives of an update."""
    answered = version - 1 if answered is None else answered
    return INT4.decode(Feedback(store, INT4).encode(some, version=version, answered=answered))


def test_what_arrived_over_many_rounds_is_what_was_sent(store: JobStore) -> None:
    sent = updates(60)
    plain = [INT4.decode(INT4.encode(some)) for some in sent]
    fed = [send(store, some, version) for version, some in enumerate(sent)]
    step = max(float(np.abs(tensor).max()) for some in sent for tensor in some.values()) / 7
    assert apart(total(fed), total(sent)) < step  # as much as one round loses, however many there were
    assert apart(total(plain), total(sent)) > 4 * step
    for name, wanted in total(sent).items():
        lost = np.linalg.norm(total(fed)[name] - wanted) / np.linalg.norm(wanted)
        assert lost < 0.05


def test_an_update_that_never_reached_the_outbox_does_not_count(store: JobStore) -> None:
    """The process was killed between the two files; the round is done again."""
    first, second = updates(2)
    arrived = [send(store, first, 4)]
    send(store, {name: 5 * tensor for name, tensor in second.items()}, 5)  # killed here: 4 is the newest answered
    arrived.append(send(store, second, 5, answered=4))
    lost = store.load("lost-5")
    assert lost is not None
    for name, wanted in total([first, second]).items():
        np.testing.assert_allclose(total(arrived)[name] + lost[name], wanted, atol=1e-6)


def test_a_first_update_that_never_reached_the_outbox_leaves_nothing_behind(store: JobStore) -> None:
    first, second = updates(2)
    send(store, first, 0)
    again = Feedback(store, INT4).encode(second, version=0, answered=-1)
    assert again == INT4.encode(second)


def test_what_tensors_lost_that_are_not_sent_now_waits_for_them(store: JobStore) -> None:
    first, second, third = updates(3)
    arrived = [send(store, first, 1)]
    send(store, {"head.bias": second["head.bias"]}, 2)
    arrived.append(send(store, third, 3))
    lost = store.load("lost-3")
    assert lost is not None
    name = "blocks.2.query.A"
    assert np.abs(first[name] - arrived[0][name]).max() > 0
    np.testing.assert_allclose(total(arrived)[name] + lost[name], total([first, third])[name], atol=1e-6)


def test_only_what_the_last_rounds_lost_is_kept(store: JobStore) -> None:
    for version, some in enumerate(updates(6)):
        send(store, some, version)
    assert sorted(file.name for file in store.folder.glob("lost-*")) == ["lost-4.safetensors", "lost-5.safetensors"]


def test_rounds_are_counted_not_spelt(store: JobStore) -> None:
    sent = updates(12)
    arrived = [send(store, some, version) for version, some in enumerate(sent)]  # 9 comes before 10
    lost = store.load("lost-11")
    assert lost is not None
    for name, wanted in total(sent).items():
        np.testing.assert_allclose(total(arrived)[name] + lost[name], wanted, atol=1e-5)


def test_a_codec_that_loses_nothing_keeps_nothing(store: JobStore) -> None:
    (some,) = updates(1)
    exact = Codec.named("f32")
    assert Feedback(store, exact).encode(some, version=0, answered=-1) == exact.encode(some)
    assert not store.folder.exists()


def test_what_training_may_not_leave_behind_is_refused_and_does_not_poison_what_is_kept(store: JobStore) -> None:
    first, second = updates(2)
    send(store, first, 0)
    before = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    with pytest.raises(MessageError, match="not finite"):
        send(store, {**second, "head.bias": np.array([0, np.nan, 1], np.float32)}, 1)
    assert {file.name: file.read_bytes() for file in store.folder.iterdir()} == before
