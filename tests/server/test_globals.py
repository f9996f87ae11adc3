"""The global tensors: what is broadcast leads devices to what the aggregator has, whatever the codec loses."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fleetune.edge.protocol.codec import CODECS, Codec
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import Payload
from fleetune.server.globals import Globals

EXPERT, GATE = ("blocks.", "head."), ("gate.",)
SHAPES = {"blocks.2.query.A": (64, 4), "head.weight": (64, 2), "gate.A": (64, 4), "gate.B": (4, 64)}


class Gains:
    """What rounds gain: the same for the same seed."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def next(self, prefixes: tuple[str, ...] = EXPERT, scale: float = 0.01) -> dict[str, Any]:
        shapes = {name: shape for name, shape in SHAPES.items() if name.startswith(prefixes)}
        return {n: (scale * self._rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


class Device:
    """What a device makes of broadcasts: it adds them up."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.sha256: str | None = None

    def hear(self, globals_: Globals, since: str | None, changes: Payload | None) -> None:
        if changes is None:
            return
        assert since == self.sha256
        data = globals_.payloads[changes.sha256]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (changes.sha256, changes.size)
        for name, change in Codec.named(changes.codec).decode(data, SHAPES).items():
            self.tensors[name] = self.tensors[name] + change if name in self.tensors else change
        assert globals_.whole is not None
        self.sha256 = globals_.whole.sha256

    def apart(self, globals_: Globals, name: str = "blocks.2.query.A") -> float:
        return float(np.abs(self.tensors[name] - globals_.tensors[name]).max())


def whole(globals_: Globals) -> dict[str, Any]:
    assert globals_.whole is not None
    data = globals_.payloads[globals_.whole.sha256]
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (globals_.whole.sha256, globals_.whole.size)
    return Codec.named(globals_.whole.codec).decode(data, SHAPES)


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])


@pytest.mark.parametrize("codec", CODECS)
def test_what_devices_add_up_is_the_whole_bit_for_bit(codec: str) -> None:
    globals_, device, gains = Globals(codec), Device(), Gains()
    for _ in range(8):
        globals_.add(gains.next())
        device.hear(globals_, *globals_.tell(EXPERT))
        assert_equal(device.tensors, whole(globals_))


def test_with_a_coarse_codec_devices_stay_as_close_as_one_round_is_coarse_however_many_there_are() -> None:
    globals_, device, gains = Globals("int4"), Device(), Gains()
    total = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    plain = dict(total)
    for _ in range(40):
        gained = gains.next()
        globals_.add(gained)
        for name, tensor in Codec.named("int4").decode(Codec.named("int4").encode(gained), SHAPES).items():
            plain[name] = plain[name] + tensor
        device.hear(globals_, *globals_.tell(EXPERT))
    step = 0.05 / 7  # no value of a round is larger than five times its deviation
    assert device.apart(globals_) < step
    without = float(np.abs(plain["blocks.2.query.A"] - globals_.tensors["blocks.2.query.A"]).max())
    assert without > 2 * device.apart(globals_)


def test_devices_approach_what_there_is_when_it_stands_still() -> None:
    globals_, device, gains = Globals("int4"), Device(), Gains()
    globals_.add(gains.next(scale=1.0))
    apart = []
    for _ in range(10):
        device.hear(globals_, *globals_.tell(EXPERT))
        apart.append(device.apart(globals_))
        globals_.add({name: 0 * tensor for name, tensor in gains.next().items()})
    assert apart[0] > 0.05
    assert all(later < earlier / 2 for earlier, later in pairwise(apart) if earlier > 1e-6)
    assert apart[-1] < apart[0] / 500


def test_what_there_is_is_the_sum_of_what_rounds_gained() -> None:
    globals_, gains = Globals("int4"), Gains()
    total = dict.fromkeys(("blocks.2.query.A", "head.weight"), np.float32(0))
    for _ in range(5):
        gained = gains.next()
        globals_.add(gained)
        total = {name: total[name] + tensor for name, tensor in gained.items()}
        globals_.tell(EXPERT)
    assert_equal(globals_.tensors, total)


def test_only_what_changed_among_the_tensors_that_are_asked_for_is_told() -> None:
    globals_, device, gains = Globals("f32"), Device(), Gains()
    assert globals_.tell(EXPERT) == (None, None)
    assert (globals_.whole, globals_.payloads) == (None, {})
    globals_.add(gains.next(EXPERT + GATE))
    assert globals_.tell(()) == (None, None)
    assert globals_.whole is None
    device.hear(globals_, *globals_.tell(EXPERT))
    assert device.tensors.keys() == {"blocks.2.query.A", "head.weight"}
    before = globals_.whole
    assert globals_.tell(EXPERT) == (None, None)  # nothing new
    assert globals_.whole == before
    assert before is not None
    assert before.sha256 in globals_.payloads  # who comes late may still ask for it
    device.hear(globals_, *globals_.tell(GATE))
    assert_equal(device.tensors, globals_.tensors)


def test_what_was_not_asked_for_is_told_in_full_later() -> None:
    globals_, device, gains = Globals("f32"), Device(), Gains()
    globals_.add(gains.next())
    device.hear(globals_, *globals_.tell(EXPERT))
    for _ in range(3):
        globals_.add(gains.next(EXPERT + GATE))
        device.hear(globals_, *globals_.tell(GATE))
    assert device.apart(globals_) > 0.01
    device.hear(globals_, *globals_.tell(EXPERT))
    for name, tensor in globals_.tensors.items():
        np.testing.assert_allclose(device.tensors[name], tensor, atol=1e-6)


def test_devices_may_ask_for_the_whole_and_the_newest_changes_and_for_nothing_older() -> None:
    globals_, gains = Globals("int8"), Gains()
    for _ in range(4):
        globals_.add(gains.next())
        _, changes = globals_.tell(EXPERT)
    assert changes is not None
    assert globals_.whole is not None
    assert globals_.payloads.keys() == {changes.sha256, globals_.whole.sha256}


def test_payloads_are_cut_as_they_are_asked_for() -> None:
    globals_ = Globals("int8")
    globals_.add(Gains().next())
    _, changes = globals_.tell(EXPERT, chunk_size=100)
    assert changes is not None
    assert globals_.whole is not None
    assert (changes.chunk_size, globals_.whole.chunk_size, changes.codec) == (100, 100, "int8")
    assert changes.chunks > 1


@pytest.mark.parametrize("codec", ["f16", "int4", "int8+zlib"])
def test_a_restart_from_a_checkpoint_goes_on_as_if_nothing_had_happened(codec: str) -> None:
    globals_, gains = Globals(codec), Gains()
    for _ in range(3):
        globals_.add(gains.next())
        globals_.tell(EXPERT)
    globals_.add(gains.next(EXPERT + GATE))  # closed, and not told yet
    again = Globals(codec, globals_.checkpoint())
    assert_equal(again.tensors, globals_.tensors)
    assert again.whole == globals_.whole
    assert_equal(whole(again), whole(globals_))
    for prefixes in (EXPERT, GATE, EXPERT):
        assert again.tell(prefixes) == globals_.tell(prefixes)
        assert again.payloads == globals_.payloads
        gained = gains.next(EXPERT + GATE)
        again.add(gained)
        globals_.add(gained)
    assert again.checkpoint() == globals_.checkpoint()


@pytest.mark.parametrize("told", [False, True])
def test_a_checkpoint_of_a_job_that_has_hardly_begun(told: bool) -> None:
    globals_ = Globals("f16")
    assert Globals("f16", globals_.checkpoint()).tensors == {}
    globals_.add(Gains().next())
    if told:
        globals_.tell(EXPERT)
    again = Globals("f16", globals_.checkpoint())
    assert again.whole == globals_.whole
    assert (again.tell(EXPERT)[1] is None) == told


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[20:], lambda raw: b"x" + raw])
def test_a_damaged_checkpoint_is_refused(damage: Any) -> None:
    globals_ = Globals("f16")
    globals_.add(Gains().next())
    globals_.tell(EXPERT)
    with pytest.raises(MessageError):
        Globals("f16", damage(globals_.checkpoint()))
