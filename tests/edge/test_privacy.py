"""The Gaussian mechanism on a device: how long an update is that leaves, how much noise it has, and what is counted.

Bounds on what is random are six standard errors wide: a test fails by chance once in some hundred million runs.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fleetune.edge.agent.privacy import (
    Ledger,
    PrivacyLimits,
    PrivateAnswer,
    Spent,
    clip_and_noise,
    discreet,
    gaussian,
    make_private,
)
from fleetune.edge.agent.state import State
from fleetune.edge.protocol.errors import BudgetError, ConfigError, DataError, PackError, PrivacyError
from fleetune.edge.protocol.messages import Announcement, Privacy, Stage

SILENT = 1e-9
"""Noise that cannot be seen."""


def update(norm: float, *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Two tensors, together of this norm."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape) for name, shape in (("b", (8, 40)), ("head", (40, 2)))}
    scale = norm / math.sqrt(sum(float(np.square(tensor).sum()) for tensor in tensors.values()))
    return {name: (tensor * scale).astype(np.float32) for name, tensor in tensors.items()}


def norm(tensors: dict[str, NDArray[Any]]) -> float:
    return math.sqrt(sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values()))


def announced(stage: Stage = "global", privacy: Privacy | None = None, *, run: str = "r", at: int = 1) -> Announcement:
    return Announcement(
        fleet="lab", run=run, job="fedms", version=at, method="fedms", stage=stage, round=at, rounds=6, backbone="b",
        quantisation="nf4", settings={}, issued=0.0, expires=0.0, privacy=privacy,
    )  # fmt: skip


# --- clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.25, 3.0])
def test_a_long_update_is_cut_to_the_clip_as_one_vector(clip: float) -> None:
    raw = update(norm=100.0)
    sent = clip_and_noise(raw, Privacy(clip, SILENT))
    assert norm(sent) == pytest.approx(clip, rel=1e-6)  # all tensors together, not each
    for name, tensor in raw.items():
        np.testing.assert_allclose(sent[name], tensor * (clip / 100), rtol=1e-5, atol=1e-8)
        assert sent[name].dtype == np.float32


def test_a_short_update_keeps_its_length() -> None:
    raw = update(norm=0.2)
    sent = clip_and_noise(raw, Privacy(0.5, SILENT))
    for name, tensor in raw.items():
        np.testing.assert_allclose(sent[name], tensor, rtol=1e-6, atol=1e-8)


# --- noise --------------------------------------------------------------------------------------------------

COUNT = 200_000


def within(found: float, wanted: float, error: float) -> None:
    assert abs(found - wanted) < 6 * error, (found, wanted, error)


@pytest.mark.parametrize(("clip", "noise"), [(1.0, 1.0), (0.5, 0.3), (2.0, 4.0)])
@pytest.mark.parametrize("length", [0.0, 0.1, 50.0])
def test_noise_has_the_deviation_that_was_asked_for_whatever_the_update(
    clip: float, noise: float, length: float
) -> None:
    raw = np.zeros(COUNT, np.float32)
    raw[0] = length
    sent = clip_and_noise({"head": raw}, Privacy(clip, noise))["head"].astype(np.float64)
    sent[0] -= min(length, clip)
    spread = clip * noise
    within(float(sent.mean()), 0.0, spread / math.sqrt(COUNT))
    within(float(sent.std()), spread, spread / math.sqrt(2 * COUNT))


def test_noise_is_normal() -> None:
    found = gaussian(COUNT)
    for z in (0.5, 1.0, 2.0, 3.0, 4.0):
        share = math.erfc(z / math.sqrt(2)) / 2
        error = math.sqrt(share * (1 - share) / COUNT)
        within(float((found > z).mean()), share, error)
        within(float((found < -z).mean()), share, error)


def test_every_value_has_noise_of_its_own() -> None:
    sent = clip_and_noise({name: np.zeros((2, COUNT), np.float32) for name in ("a", "b")}, Privacy(1.0, 1.0))
    rows = np.concatenate([sent["a"], sent["b"]]).astype(np.float64)
    for one, other in ((0, 1), (0, 2), (1, 3)):
        within(float((rows[one] * rows[other]).mean()), 0.0, 1 / math.sqrt(COUNT))
    within(float((rows[0, 1:] * rows[0, :-1]).mean()), 0.0, 1 / math.sqrt(COUNT))


def test_nobody_who_knows_a_seed_can_draw_the_noise_again() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(7)
        random.seed(7)
        drawn.append(clip_and_noise(update(1.0), Privacy(1.0, 1.0)))
    for name, tensor in drawn[0].items():
        assert not (tensor == drawn[1][name]).any()


# --- what may leave -----------------------------------------------------------------------------------------

METRICS = {
    "loss": 0.7, "val": 0.8, "test": 0.75, "test_global": 0.7, "gate_local": 0.6, "samples": 40, "depth": 2,
    "cpu_s": 1.5, "peak_mib": 80.0, "plan_cache_mib": 12.5, "plan_cpu_s": 1.4, "label_3": 5,
}  # fmt: skip


def told(stage: Stage, *, accuracy: bool, at: int = 6, limits: PrivacyLimits | None = None) -> set[str]:
    privacy = Privacy(1.0, 1.0, accuracy)
    made = make_private(
        PrivateAnswer(METRICS, {}), announced(stage, privacy, at=at), privacy, limits or PrivacyLimits()
    )
    return set(made.metrics)


RESOURCES = {"depth", "cpu_s", "peak_mib"}


@pytest.mark.parametrize("stage", ["prepare", "global", "personal", "train", "evaluate"])
def test_no_figure_that_says_something_of_the_samples_leaves(stage: Stage) -> None:
    assert told(stage, accuracy=False) == RESOURCES


def test_accuracies_leave_once_if_they_are_asked_for() -> None:
    accuracies = {"test", "test_global"}
    assert told("evaluate", accuracy=True) == RESOURCES | accuracies
    assert told("train", accuracy=True, at=6) == RESOURCES | accuracies  # a baseline's last round
    for stage, at in (("train", 5), ("global", 6), ("personal", 6), ("prepare", 6)):
        assert told(stage, accuracy=True, at=at) == RESOURCES  # type: ignore[arg-type]


def test_an_owner_with_a_limit_tells_no_accuracy() -> None:
    assert told("evaluate", accuracy=True, limits=PrivacyLimits(min_noise=0.5)) == RESOURCES


def test_why_a_device_cannot_take_part_says_nothing_of_its_samples() -> None:
    for error in (BudgetError("lacks 3.25 CPU s for 41 samples", "raise it"), DataError("line 7", "mend it")):
        assert "exit code" in discreet(error)
        assert not {"3.25", "41", "line 7"} & set(discreet(error).split())
    assert "another pack" in discreet(PackError("the job is for another pack", "take that"))


# --- what has left is counted -------------------------------------------------------------------------------

NOISY = Privacy(1.0, 0.8)


def answer() -> PrivateAnswer:
    return PrivateAnswer({}, {"head": np.zeros(2, np.float32)})


class Device:
    """A device's ledger, through restarts."""

    def __init__(self, folder: Path, limits: PrivacyLimits | None = None) -> None:
        self.state = State(folder, "d")
        self.ledger = Ledger(self.state, limits or PrivacyLimits())

    def send(self, one: Announcement) -> None:
        self.ledger.check(one)
        self.ledger.count(one, answer())

    @property
    def spent(self) -> Spent:
        return self.state.read("privacy.json", Spent) or Spent()


@pytest.mark.parametrize("noise", [None, 0.5, 0.79, math.inf])
def test_a_job_with_less_noise_than_the_owner_asks_for_is_declined(noise: float | None, tmp_path: Path) -> None:
    ledger = Device(tmp_path, PrivacyLimits(min_noise=0.8)).ledger
    for stage in ("prepare", "global", "personal", "evaluate"):
        with pytest.raises(PrivacyError, match=r"asks for 0\.8"):
            ledger.check(announced(stage, None if noise is None else Privacy(1.0, noise)))  # type: ignore[arg-type]


def test_a_job_with_the_noise_that_the_owner_asks_for_is_taken(tmp_path: Path) -> None:
    Device(tmp_path, PrivacyLimits(min_noise=0.8)).ledger.check(announced(privacy=NOISY))


def test_who_asks_for_nothing_takes_any_job(tmp_path: Path) -> None:
    ledger = Device(tmp_path).ledger
    ledger.check(announced())
    ledger.check(announced(privacy=Privacy(1.0, 1e-6)))


def test_updates_are_counted_over_all_jobs_and_restarts(tmp_path: Path) -> None:
    limits = PrivacyLimits(min_noise=0.8, max_updates=3)
    for run, version in (("r", 1), ("r", 2), ("s", 1)):  # another run asks about the same samples
        device = Device(tmp_path, limits)
        device.send(announced(privacy=NOISY, run=run, at=version))
        device.state.close()
    device = Device(tmp_path, limits)
    for run in ("r", "s", "t"):
        with pytest.raises(PrivacyError, match="3 private updates have left this device, and its owner allows 3"):
            device.send(announced(privacy=NOISY, run=run, at=9))
    for stage in ("prepare", "evaluate"):  # in which nothing is sent
        device.ledger.check(announced(stage, NOISY))  # type: ignore[arg-type]
    assert {job: spent.updates for job, spent in device.spent.jobs.items()} == {"r/fedms": 2, "s/fedms": 1}


def test_the_least_noise_of_a_job_is_kept(tmp_path: Path) -> None:
    device = Device(tmp_path)
    for noise in (2.0, 0.5, 1.0):
        device.send(announced(privacy=Privacy(1.0, noise)))
    assert device.spent.jobs["r/fedms"].noise == 0.5


def test_only_what_is_private_and_sent_is_counted(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.ledger.count(announced(), answer())
    device.ledger.count(announced("prepare", NOISY), PrivateAnswer({}, {}))
    assert device.spent.updates == 0


def test_an_answer_that_waits_for_room_on_the_disk_is_counted_once(tmp_path: Path) -> None:
    device, waiting = Device(tmp_path), answer()
    for _ in range(3):
        device.ledger.count(announced(privacy=NOISY), waiting)
    assert device.spent.updates == 1
    device.ledger.count(announced(privacy=NOISY), answer())  # drawn anew
    assert device.spent.updates == 2


def test_a_damaged_count_is_not_taken_for_none(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.send(announced(privacy=NOISY))
    device.state.close()
    (tmp_path / "privacy.json").write_bytes(b'{"jobs"')
    with pytest.raises(ConfigError, match=r"privacy\.json") as caught:
        Device(tmp_path)
    assert "backup" in caught.value.remedy
