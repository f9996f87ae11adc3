"""The round that is open: updates weigh by their samples and by how late they come; figures by the devices."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.server.job import RuleSettings
from fleetune.server.journal import Accepted, Typical
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds, norm_of, staleness_weight
from fleetune.server.strategies.base import NextRound

ANNOUNCEMENT = Announcement(
    fleet="lab", run="r", job="fedms", version=5, method="fedms", stage="global", round=3, rounds=5, backbone="b",
    quantisation="nf4", settings={"depth": 2}, issued=0.0, expires=1e9,
)  # fmt: skip


SETTINGS = RuleSettings()


FAR = Typical(norm=1e9, samples=10**9)


def opened(typical: Typical | None = FAR) -> OpenRound:
    """A round whose bounds are far away, unless it is told otherwise."""

    def nothing_to_load(_accepted: Accepted) -> dict[str, Any]:
        raise AssertionError("the sum is a stream")

    return OpenRound(ANNOUNCEMENT, NextRound("global", 2), Bounds(SETTINGS, typical), nothing_to_load)


@pytest.fixture
def current() -> OpenRound:
    return opened()


def accepted(
    device: str, samples: int = 1, version: int = 5, staleness: int = 0, norm: float = 1.0, **metrics: Any
) -> Accepted:
    manifest = UpdateManifest(
        fleet="lab", device=device, update=f"u-{version}", run="r", job="fedms", version=version, issued=0.0,
        backbone="b",
        samples=samples, metrics=metrics,
    )  # fmt: skip
    return Accepted(manifest, 1e9, into=5, staleness=staleness, norm=norm)


def tensors(**values: float) -> dict[str, Any]:
    return {name: np.full(2, value, np.float32) for name, value in values.items()}


def gain(current: OpenRound) -> dict[str, float]:
    found = current.gain()
    assert all(tensor.dtype == np.float32 and tensor[0] == tensor[1] for tensor in found.values())
    return {name: float(tensor[0]) for name, tensor in found.items()}


def test_what_a_round_gains_is_weighted_by_samples(current: OpenRound) -> None:
    current.add(accepted("a", 30), tensors(x=1))
    current.add(accepted("b", 10), tensors(x=5))
    assert gain(current) == {"x": 2}


def test_a_tensor_is_averaged_over_those_who_trained_it(current: OpenRound) -> None:
    current.add(accepted("a", 10), tensors(deep=8, top=4))
    current.add(accepted("b", 20), tensors(top=1))
    assert gain(current) == {"deep": 8, "top": 2}


def test_a_late_update_counts_less_the_more_rounds_it_missed() -> None:
    found = []
    for staleness in (0, 1, 3, 8):
        current = opened()
        current.add(accepted("a", version=5 - staleness, staleness=staleness), tensors(x=6))
        found.append(gain(current)["x"])
    assert found == pytest.approx([6, 6 / math.sqrt(2), 3, 2])
    assert staleness_weight(0) == 1
    assert all(later < earlier for earlier, later in itertools.pairwise(map(staleness_weight, range(50))))


def test_a_late_update_does_not_make_the_others_count_more(current: OpenRound) -> None:
    current.add(accepted("a", 10), tensors(x=4))
    current.add(accepted("b", 10, version=2, staleness=3), tensors(x=4))
    assert gain(current) == {"x": 3}  # (4 + 4 / 2) / 2


def test_the_order_of_the_devices_does_not_show() -> None:
    rng = np.random.default_rng(0)
    updates = [
        (accepted(f"d{n}", n + 1, staleness=n % 3), {"x": rng.standard_normal(50).astype(np.float32)}) for n in range(9)
    ]
    found = []
    for order in (updates, updates[::-1]):
        current = opened()
        for record, some in order:
            current.add(record, some)
        found.append(current.gain()["x"])
    np.testing.assert_array_equal(*found)


def test_answers_and_late_updates_are_counted_apart(current: OpenRound) -> None:
    assert (current.updates, current.gain(), current.means()) == (0, {}, {})
    current.add(accepted("a", loss=1.0), {})
    current.add(accepted("b", version=4, staleness=1, loss=9.0), tensors(x=1))
    assert (set(current.answers), current.late, current.updates) == ({"a"}, 1, 2)
    current.add(accepted("b", loss=3.0), {})  # the same device, in time
    assert (set(current.answers), current.late, current.updates) == ({"a", "b"}, 1, 3)
    assert current.means() == {"loss": 2}  # of what this round asked for


def test_a_mean_is_over_the_devices_that_reported_the_figure(current: OpenRound) -> None:
    current.add(accepted("a", val=0.5), {})
    current.add(accepted("b", samples=99, val=1.0, loss=3), {})
    current.add(accepted("c"), {})
    assert current.means() == {"loss": 3, "val": 0.75}


def test_figures_that_are_no_finite_numbers_do_not_count(current: OpenRound) -> None:
    for device, value in (("a", 0.5), ("b", "high"), ("c", math.nan), ("d", math.inf), ("e", True)):
        current.add(accepted(device, val=value), {})
    assert current.means() == {"val": 0.5}
    assert opened().means() == {}


def test_a_round_says_what_was_typical_of_it(current: OpenRound) -> None:
    assert current.typical is None
    current.add(accepted("a"), {})  # it only reports
    assert current.typical is None
    for device, samples, norm in (("b", 10, 4.0), ("c", 30, 1.0), ("d", 20, 0.0)):  # nothing was learned on d
        current.add(accepted(device, samples, norm=norm), tensors(x=norm))
    assert current.typical == Typical(norm=4.0, samples=30)  # of two the larger: nothing says which is right
    current.add(accepted("e", 20, version=4, staleness=1, norm=2.0), tensors(x=2))
    assert current.typical == Typical(norm=2.0, samples=20)
    current.add(accepted("f", 40, norm=9.0), tensors(x=9))
    assert current.typical == Typical(norm=2.0, samples=20)  # the lower of two in the middle


def test_above_a_multiple_of_what_is_typical_an_update_is_refused() -> None:
    assert opened(None).limit == math.inf
    current = opened(Typical(norm=3.0, samples=1))
    assert current.limit == 3 * SETTINGS.outlier
    for device, norm in (("a", 5.0), ("b", 0.1)):
        current.add(accepted(device, norm=norm), tensors(x=norm))
    assert current.limit == 3 * SETTINGS.outlier
    current.add(accepted("c", norm=6.0), tensors(x=6))
    assert current.limit == 5 * SETTINGS.outlier


def test_those_who_come_first_with_little_do_not_have_the_others_refused() -> None:
    current = opened(Typical(norm=3.0, samples=1))
    for device in "abc":
        current.add(accepted(device, norm=1e-9), tensors(x=1e-9))
    assert current.limit == 3 * SETTINGS.outlier


def test_in_the_first_round_those_who_come_first_refuse_nobody() -> None:
    current = opened(None)
    for device in "abc":
        current.add(accepted(device, norm=1e-9), tensors(x=1e-9))
    assert current.limit == math.inf


def test_the_norm_of_an_update_is_over_all_its_tensors() -> None:
    assert norm_of({}) == 0
    assert norm_of({"a": np.array([3, 0], np.float32), "b": np.array([[-4]], np.float32)}) == 5
    assert norm_of({"a": np.full(4, 3e38, np.float32)}) == pytest.approx(6e38)
