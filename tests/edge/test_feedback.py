"""Error feedback: what a coarse codec loses arrives with a later round, and none of it twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fleetune.edge.agent.feedback import encode_with_feedback
from fleetune.edge.protocol.codec import Codec, Tensors
from fleetune.edge.protocol.errors import MessageError

INT4 = Codec.named("int4")
SHAPES = {"blocks.2.query.A": (32, 4), "head.weight": (32, 2), "head.bias": (3,)}


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


class Device:
    """Sends updates, and keeps what they lack."""

    def __init__(self, codec: Codec = INT4) -> None:
        self.codec, self.lost = codec, Tensors()

    def send(self, some: Tensors) -> Tensors:
        """What arrives of an update."""
        data, self.lost = encode_with_feedback(some, self.lost, self.codec)
        return self.codec.decode(data, SHAPES)


def test_what_arrived_over_many_rounds_is_what_was_sent() -> None:
    sent, device = updates(60), Device()
    plain = [INT4.decode(INT4.encode(some), SHAPES) for some in sent]
    fed = [device.send(some) for some in sent]
    step = max(float(np.abs(tensor).max()) for some in sent for tensor in some.values()) / 7
    assert apart(total(fed), total(sent)) < step  # as much as one round loses, however many there were
    assert apart(total(plain), total(sent)) > 4 * step
    for name, wanted in total(sent).items():
        lost = np.linalg.norm(total(fed)[name] - wanted) / np.linalg.norm(wanted)
        assert lost < 0.05
        np.testing.assert_allclose(total(fed)[name] + device.lost[name], wanted, atol=1e-5)


def test_what_tensors_lost_that_are_not_sent_now_waits_for_them() -> None:
    device, (first, second, third) = Device(), updates(3)
    arrived = [device.send(first)]
    device.send({"head.bias": second["head.bias"]})
    arrived.append(device.send(third))
    name = "blocks.2.query.A"
    assert np.abs(first[name] - arrived[0][name]).max() > 0
    np.testing.assert_allclose(total(arrived)[name] + device.lost[name], total([first, third])[name], atol=1e-6)


def test_a_codec_that_loses_nothing_keeps_nothing() -> None:
    (some,) = updates(1)
    exact = Codec.named("f32")
    assert encode_with_feedback(some, {}, exact) == (exact.encode(some), {})


def test_what_training_may_not_leave_behind_is_refused() -> None:
    device, (first, second) = Device(), updates(2)
    device.send(first)
    before = dict(device.lost)
    with pytest.raises(MessageError, match="not finite"):
        device.send({**second, "head.bias": np.array([0, np.nan, 1], np.float32)})
    assert device.lost == before
