"""A device's measured costs for one pack, and the model that extends them to every plan.

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
import itertools
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.prefix import CHUNK
from fleetune.edge.pack.manifest import Manifest
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import UNDECODABLE, BudgetError, ConfigError
from fleetune.edge.protocol.files import read_bytes
from fleetune.edge.resources.powermode import POWER_MODE, cores_of, read_power_mode
from fleetune.edge.resources.trial import Request, Trial, run_trial

Features = NDArray[np.float64]

MAX_COSTS = 4 << 20
"""Largest file of costs in bytes."""

_HIDDEN_MIB = 0.5
"""Steps that raise the peak by less hide below that of the frozen blocks."""


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Trials of one pack on one machine.

    Attributes:
        pack: Identity of the pack.
        kit: Version of Fleetune.
        onnxruntime: Version of ONNX Runtime.
        machine: Processor architecture.
        threads: Threads of the trials.
        power_mode: What the processor was allowed, as :func:`read_power_mode` says it.
        trials: What was measured.
    """

    pack: str
    kit: str
    onnxruntime: str
    machine: str
    threads: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    power_mode: Annotated[str, msgspec.Meta(pattern=POWER_MODE)]
    trials: Annotated[tuple[Trial, ...], msgspec.Meta(min_length=1, max_length=1024)]

    @functools.cached_property
    def base_mib(self) -> float:
        """Peak of a process before it trains, in MiB (median over the trials)."""
        return float(np.median([trial.base_mib for trial in self.trials]))

    @functools.cached_property
    def length(self) -> int:
        """Tokens of the longest samples that were measured."""
        return max(trial.length for trial in self.trials)

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
        found = [trial.watts for trial in self.trials if trial.watts is not None]
        return float(np.median(found)) if found else None

    @functools.cached_property
    def _frozen(self) -> Features:
        rows = [_frozen_features(trial.micro_batch, trial.length) for trial in self.trials]
        return _solve(rows, [(trial.frozen_mib - trial.base_mib, trial.frozen_mib) for trial in self.trials])

    @functools.cached_property
    def _forward(self) -> tuple[Features, Features]:
        rows = [_forward_features(CHUNK, trial.micro_batch, trial.length) for trial in self.trials]
        wall = [(trial.forward_s, trial.forward_s) for trial in self.trials]
        cpu = [(trial.forward_cpu_s, trial.forward_cpu_s) for trial in self.trials]
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
            if (trials := [trial for trial in self.trials if trial.recompute is policy])
        }

    def covers(self, depth: int, micro_batch: int, length: int, *, recompute: bool) -> bool:
        """Whether something at least as large was measured under this policy; the model says nothing beyond."""
        return any(
            trial.recompute is recompute
            and trial.depth >= depth
            and trial.micro_batch * trial.length >= micro_batch * length
            and trial.micro_batch * trial.length**2 >= micro_batch * length**2
            for trial in self.trials
        )

    def stale(self, pack: Pack, *, length: int, threads: int | None = None, here: bool = True) -> str:
        """Why these costs do not count for a pack, or for samples this long; empty if they do.

        Args:
            pack: The pack.
            length: Tokens of the longest sample.
            threads: Threads of ONNX Runtime; None for those of the trials.
            here: Whether this is the device, whose runtime and power mode have to be those of the trials.
        """
        now = {"pack": pack.sha256, "kit": version("fleetune")} | (_here() if here else {})
        for name, value in now.items():
            was = getattr(self, name)
            if was != value:
                return f"measured with {name.replace('_', ' ')} {was}, this is {value}"
        deepest = max(trial.depth for trial in self.trials)
        if deepest > pack.manifest.blocks:
            return f"measured up to depth {deepest}, the pack has {pack.manifest.blocks} blocks"
        cores = cores_of(self.power_mode)
        if threads is not None and (self.threads or cores) != (threads or cores):
            return f"measured with {self.threads or cores} threads, not {threads or cores}"
        return f"measured up to {self.length} tokens, a sample has {length}" if self.length < length else ""


def read_costs(path: Path) -> Costs:
    """Read costs that were measured before.

    Raises:
        ConfigError: The file cannot be read, or does not fit its schema.
    """
    try:
        return msgspec.json.decode(read_bytes(path, MAX_COSTS), type=Costs)
    except (OSError, *UNDECODABLE) as error:
        raise ConfigError(f"{path}: {error}", "measure again") from error


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


def _here() -> dict[str, str]:
    return {
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "power_mode": read_power_mode(),
    }


def grid(manifest: Manifest, longest: int) -> list[tuple[bool, int, int, int]]:
    """What is measured, the small before the large: policy, depth, micro-batch, tokens.

    Both policies, at depth 1, half and all, with few and many samples, short and long where samples are text.

    Args:
        manifest: The pack's.
        longest: Tokens of the longest sample.
    """
    depths = sorted({1, -(-manifest.blocks // 2), manifest.blocks})
    lengths = sorted({max(1, longest // parts) for parts in (4, 2, 1)}) if manifest.text is not None else [longest]
    ends = itertools.product((depths[0], depths[-1]), (2, 16), (lengths[0], lengths[-1]))
    middle = [(depths[len(depths) // 2], micro_batch, lengths[len(lengths) // 2]) for micro_batch in (4, 16)]
    cells = [(recompute, *cell) for cell in {*ends, *middle} for recompute in (False, True)]
    return sorted(cells, key=lambda cell: (cell[2] * cell[3], cell[1], cell[0]))


def measure(
    pack: Pack,
    *,
    threads: int,
    longest: int | None = None,
    limit_mib: float | None = None,
    at_once: int = 1,
    on_trial: Callable[[int, int], None] = lambda _done, _total: None,
) -> Costs:
    """Run the trials of :func:`grid`, each in a process of its own.

    Args:
        pack: The pack.
        threads: Threads of ONNX Runtime.
        longest: Tokens of the longest sample; by default of the longest that the pack takes.
        limit_mib: Memory that a trial may take; those that want more are left out of the model.
        at_once: Trials side by side: more than one if as many agents are to share the machine, so that they are
            measured as they will run.
        on_trial: Is told how many of the trials are done.

    Raises:
        BudgetError: A trial failed, or not even the smallest fits the limit.
    """
    requests = [
        Request(str(pack.path), depth, micro_batch, length, recompute, threads)
        for recompute, depth, micro_batch, length in grid(pack.manifest, longest or pack.manifest.longest)
    ]
    trials = list[Trial]()
    with ThreadPoolExecutor(at_once) as pool:
        on_trial(0, len(requests))
        found = pool.map(lambda request: run_trial(request, limit_mib=limit_mib), requests)
        for done, (request, trial) in enumerate(zip(requests, found, strict=True), start=1):
            if isinstance(trial, Trial):
                trials.append(trial)
            elif request == requests[0]:
                raise BudgetError(
                    f"a training step of {request.micro_batch} samples of {request.length} tokens at depth 1 takes "
                    f"more than {trial.limit_mib:.0f} MiB",
                    "give it more memory, or use a smaller backbone",
                )
            on_trial(done, len(requests))
    return Costs(pack=pack.sha256, kit=version("fleetune"), threads=threads, trials=tuple(trials), **_here())
