"""The model that extends a device's measured costs to every plan.

For each activation policy, what steps add to a process's memory, and the time of a step, are sums of a constant and
of terms in depth D, tokens T = micro-batch × length, and pairs of tokens P = micro-batch × length²:

    c₀ + c₁ D + c₂ T + c₃ D T + c₄ P + c₅ D P

which are weights, hidden states, activations and attention. Samples go through the frozen blocks before: that has a
peak of its own, a₀ + a₁ length + a₂ T + a₃ P, and the larger one counts. A frozen block takes time to dequantise, once
a chunk of samples, and for each micro-batch, token and pair of tokens. Least squares finds the coefficients from
trials at the ends and in the middle of the grid, each weighted by the inverse of what it measured, so that relative
errors count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.prefix import CHUNK
from fleetune.edge.resources.trial import Trial

Features = NDArray[np.float64]

_HIDDEN_MIB = 0.5
"""Steps that raise the peak by less hide below that of the frozen blocks."""


class CostModel:
    """The coefficients, each found when it is first asked for.

    Args:
        trials: What was measured, of one pack on one machine.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = trials

    @functools.cached_property
    def base_mib(self) -> float:
        """Peak of a process before it trains, in MiB (median over the trials)."""
        return float(np.median([trial.base_mib for trial in self._trials]))

    def growth_mib(self, depth: int, micro_batch: int, length: int, *, recompute: bool) -> float:
        """Predicted MiB that training adds to the peak of the process, ``length`` being the longest sample's tokens."""
        frozen = float(_frozen_features(micro_batch, length) @ self._frozen)
        return max(frozen, float(_features(depth, micro_batch, length) @ self._memory[recompute]))

    def step_s(self, depth: int, micro_batch: float, length: float, *, recompute: bool) -> tuple[float, float]:
        """Predicted seconds and CPU seconds of a step: a micro-batch, padded to ``length`` tokens, there and back."""
        features = _features(depth, micro_batch, length)
        return float(features @ self._wall[recompute]), float(features @ self._cpu[recompute])

    def forward_s(self, samples: float, micro_batch: int, length: float) -> tuple[float, float]:
        """Predicted seconds and CPU seconds of one block's forward pass over some samples, in micro-batches."""
        features = _forward_features(samples, micro_batch, length)
        wall, cpu = self._forward
        return float(features @ wall), float(features @ cpu)

    @functools.cached_property
    def watts(self) -> float | None:
        """Power while training (median over the trials); None without a sensor."""
        found = [trial.watts for trial in self._trials if trial.watts is not None]
        return float(np.median(found)) if found else None

    @functools.cached_property
    def _frozen(self) -> Features:
        rows = [_frozen_features(trial.micro_batch, trial.length) for trial in self._trials]
        return _solve(rows, [(trial.frozen_mib - trial.base_mib, trial.frozen_mib) for trial in self._trials])

    @functools.cached_property
    def _forward(self) -> tuple[Features, Features]:
        rows = [_forward_features(CHUNK, trial.micro_batch, trial.length) for trial in self._trials]
        wall = [(trial.forward_s, trial.forward_s) for trial in self._trials]
        cpu = [(trial.forward_cpu_s, trial.forward_cpu_s) for trial in self._trials]
        return _solve(rows, wall), _solve(rows, cpu)

    @functools.cached_property
    def _memory(self) -> dict[bool, Features]:
        return self._for_each_policy(_fit_memory)

    @functools.cached_property
    def _cpu(self) -> dict[bool, Features]:
        return self._for_each_policy(lambda trials: _fit_time(trials, [trial.step_cpu_s for trial in trials]))

    @functools.cached_property
    def _wall(self) -> dict[bool, Features]:
        return self._for_each_policy(lambda trials: _fit_time(trials, [trial.step_s for trial in trials]))

    def _for_each_policy(self, fit: Callable[[list[Trial]], Features]) -> dict[bool, Features]:
        return {
            policy: fit(trials)
            for policy in (False, True)
            if (trials := [trial for trial in self._trials if trial.recompute is policy])
        }


def _features(depth: float, micro_batch: float, length: float) -> Features:
    tokens, pairs = micro_batch * length, micro_batch * length**2
    return np.array([1.0, depth, tokens, depth * tokens, pairs, depth * pairs])


def _frozen_features(micro_batch: float, length: float) -> Features:
    return np.array([1.0, length, micro_batch * length, micro_batch * length**2])


def _forward_features(samples: float, micro_batch: int, length: float) -> Features:
    parts = samples / micro_batch
    return np.array([samples / CHUNK, parts, samples * length, samples * length**2])


def _fit_memory(trials: list[Trial]) -> Features:
    """Where steps hide below the frozen blocks' peak, that is a bound: it counts where a fit would lie above it."""
    counted = [trial for trial in trials if trial.peak_mib > trial.frozen_mib + _HIDDEN_MIB]
    while True:
        found = _solve(
            [_features(trial.depth, trial.micro_batch, trial.length) for trial in counted or trials],
            [(trial.peak_mib - trial.base_mib, trial.peak_mib) for trial in counted or trials],
        )
        above = [
            trial
            for trial in trials
            if trial not in counted
            and _features(trial.depth, trial.micro_batch, trial.length) @ found > trial.peak_mib - trial.base_mib
        ]
        if not counted or not above:
            return found
        counted = counted + above


def _fit_time(trials: list[Trial], seconds: list[float]) -> Features:
    rows = [_features(trial.depth, trial.micro_batch, trial.length) for trial in trials]
    return _solve(rows, list(zip(seconds, seconds, strict=True)))


def _solve(rows: list[Features], values: list[tuple[float, float]]) -> Features:
    """Coefficients for which errors of values, each relative to the second number, are least."""
    matrix, wanted = np.array(rows), np.array(values)
    units = np.abs(matrix).max(axis=0)  # so that lstsq judges no term by the size of its unit
    weights = 1 / wanted[:, 1]
    solved = np.linalg.lstsq(matrix / units * weights[:, None], wanted[:, 0] * weights, rcond=None)[0]
    found: Features = solved / units
    return found
