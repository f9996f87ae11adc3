"""Differential privacy of one device: what leaves it says little about its samples, whoever sees it.

What is protected is the whole device: all that its samples contributed to a round, against a round in which it took
part and contributed nothing. An update is clipped, then noise is added, and only then is it encoded; the codec and its
error feedback see nothing else, so they cannot undo it. Figures that say something about samples stay here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.agent.state import State
from fleetune.edge.agent.worker import Answer, Metrics
from fleetune.edge.protocol.codec import Tensors
from fleetune.edge.protocol.errors import BudgetError, ConfigError, DataError, FleetuneError, PrivacyError
from fleetune.edge.protocol.messages import Announcement, Privacy

log = logging.getLogger(__name__)

RESOURCES = frozenset(
    {
        *("depth", "cpu_s", "seconds", "peak_mib", "stopped_early", "stopped_for", "eased"),
        *("plan_depth", "plan_micro_batch", "plan_recompute", "plan_cache", "plan_bound_by"),
    }
)
"""Metrics that may leave: what was measured of the machine. What was computed from the samples' number may not."""

_FILE = "privacy.json"
_TERMS = 4


@dataclass(frozen=True)
class PrivacyLimits:
    """What a device's owner asks for, whatever an aggregator announces.

    Attributes:
        min_noise: Least noise of an update, over the clip; None takes any job, private or not.
        max_updates: Private updates that may leave the device, in all jobs together; None for no limit.
    """

    min_noise: float | None = None
    max_updates: int | None = None


class SpentJob(msgspec.Struct, frozen=True):
    """What a job has had of a device.

    Attributes:
        updates: Its private updates.
        noise: The least noise of one of them, over its clip.
    """

    updates: int
    noise: float


class Spent(msgspec.Struct, frozen=True):
    """The file ``privacy.json``: run and job → what it has had."""

    jobs: dict[str, SpentJob] = {}

    @property
    def updates(self) -> int:
        """Private updates that may have left."""
        return sum(job.updates for job in self.jobs.values())


class Ledger:
    """Counts on disk what has left a device, and holds announcements to its owner's limits.

    Args:
        state: The device's folder.
        limits: The owner's.

    Raises:
        ConfigError: The file is damaged.
    """

    def __init__(self, state: State, limits: PrivacyLimits) -> None:
        self._state, self._limits = state, limits
        try:
            self._spent = state.read(_FILE, Spent) or Spent()
        except ConfigError as error:
            raise ConfigError(
                error.what, "restore it from a backup: it counts what others may know of this device's data"
            ) from error
        self._counted: Answer | None = None

    def check(self, announced: Announcement) -> None:
        """See that a round is within the limits.

        Raises:
            PrivacyError: It is not.
        """
        least, most = self._limits.min_noise, self._limits.max_updates
        offered = 0.0 if announced.privacy is None else announced.privacy.noise
        if least is not None and not least <= offered < math.inf:
            raise PrivacyError(
                f"the job {announced.job} adds noise of {offered:g} times the clip to an update, "
                f"and this device's owner asks for {least:g}",
                "start the job with more noise, or ask the owner",
            )
        sends = announced.stage not in ("prepare", "evaluate")
        if most is not None and sends and self._spent.updates >= most:
            raise PrivacyError(
                f"{self._spent.updates} private updates have left this device, and its owner allows {most}",
                "ask the owner; who takes other samples may start with a new state folder",
            )

    def count(self, announced: Announcement, answer: Answer) -> None:
        """Write that an update leaves; before it does, so that a crash may count one too many and never one too few.

        Raises:
            OSError: There is no room. Nothing is counted then, and nothing may leave.
        """
        if announced.privacy is None or not answer.tensors or answer is self._counted:
            return
        key = f"{announced.run}/{announced.job}"
        before = self._spent.jobs.get(key, SpentJob(0, math.inf))
        after = SpentJob(before.updates + 1, min(before.noise, announced.privacy.noise))
        spent = Spent({**self._spent.jobs, key: after})
        self._state.save(_FILE, spent)
        self._spent, self._counted = spent, answer


@dataclass(frozen=True)
class PrivateAnswer:
    """What may leave of a round.

    Attributes:
        metrics: Figures that say nothing about samples, and accuracies if they were agreed on.
        tensors: The update, clipped and with noise.
    """

    metrics: Metrics
    tensors: Tensors


def make_private(answer: Answer, announced: Announcement, privacy: Privacy, limits: PrivacyLimits) -> PrivateAnswer:
    """Take from an answer what may leave.

    Accuracies leave when the job is over, if they are asked for, and the owner has set no limit: they have no noise.
    """
    names = set(RESOURCES)
    if privacy.accuracy and limits.min_noise is None and _is_last(announced):
        names |= {name for name in answer.metrics if name == "test" or name.startswith("test_")}
    metrics = {name: value for name, value in answer.metrics.items() if name in names}
    return PrivateAnswer(metrics, clip_and_noise(answer.tensors, privacy) if answer.tensors else {})


def _is_last(announced: Announcement) -> bool:
    last = announced.round == announced.rounds
    return announced.stage == "evaluate" or (announced.stage == "train" and last)


def clip_and_noise(tensors: Mapping[str, NDArray[np.float32]], privacy: Privacy) -> Tensors:
    """The Gaussian mechanism on a whole update u: ``u · min(1, C / ‖u‖₂) + N(0, (z C)² I)`` (Dwork and Roth 2014, A).

    Args:
        tensors: Full name → tensor; the norm is that of all of them together.
        privacy: C and z.

    Returns:
        Full name → float32 of the same shape.
    """
    norm = math.sqrt(sum(float(np.vdot(tensor, tensor)) for tensor in _exact(tensors).values()))
    scale = min(1.0, privacy.clip / norm) if norm else 1.0
    log.info("the update's norm is %.3g; it leaves with %.3g, and noise", norm, norm * scale)  # in this device's log
    spread = privacy.noise * privacy.clip
    return {
        name: (tensor * scale + spread * gaussian(tensor.size).reshape(tensor.shape)).astype(np.float32)
        for name, tensor in _exact(tensors).items()
    }


def _exact(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    return {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def gaussian(count: int) -> NDArray[np.float64]:
    """Standard normal values [count] from the kernel's cryptographic generator: nobody can draw them a second time.

    Each is half the sum of four that Box and Muller's method (1958) gives. Which floats one such value can be depends
    on what it is added to (Mironov 2012); of a sum of four nobody knows how to tell it (Holohan and Braghin 2021).
    """
    words = np.frombuffer(os.urandom(16 * _TERMS * count), dtype=np.uint64).reshape(2, _TERMS, count)
    first, second = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    half: NDArray[np.float64] = normal.sum(axis=0) / math.sqrt(_TERMS)
    return half


def discreet(error: FleetuneError) -> str:
    """Why a device cannot take part, without what its samples have to do with it."""
    if isinstance(error, DataError | BudgetError):
        return f"{type(error).__name__}, exit code {error.exit_code} (the device's own log says why)"
    return error.public
