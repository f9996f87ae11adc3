"""A device's measured costs for one pack, and the model that extends them to every plan.

For each activation policy, what training adds to a process's memory is bilinear in depth and micro-batch, with every
sample as long as the longest: a constant, weights a block, activations a sample, activations a sample and block. The
time of a step is bilinear in depth and tokens. Trials at the four corners of the grid determine the four
coefficients of each.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.pack import Pack
from fleetune.edge.resources.trial import Request, Trial, run_trial


class Costs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Trials of one pack on one machine.

    Attributes:
        pack: Identity of the pack.
        kit: Version of Fleetune.
        onnxruntime: Version of ONNX Runtime.
        machine: Processor architecture.
        threads: Threads of the trials.
        length: Tokens of the longest sample, at which memory was measured.
        typical: Tokens of the samples with which time was measured.
        trials: What was measured.
    """

    pack: str
    kit: str
    onnxruntime: str
    machine: str
    threads: int
    length: int
    typical: int
    trials: tuple[Trial, ...]

    @functools.cached_property
    def base_mib(self) -> float:
        """Peak of a process before it trains, in MiB (median over the trials)."""
        return float(np.median([trial.base_mib for trial in self.trials]))

    def growth_mib(self, depth: int, micro_batch: int, *, recompute: bool) -> float:
        """Predicted MiB that training adds to the peak of the process."""
        return float(_features(depth, micro_batch) @ self._fits[recompute][0])

    def step_cpu_s(self, depth: int, tokens: float, *, recompute: bool) -> float:
        """Predicted CPU seconds of one forward and backward pass of a micro-batch of ``tokens``, padding included."""
        return float(_features(depth, tokens) @ self._fits[recompute][1])

    @functools.cached_property
    def forward_cpu_s(self) -> float:
        """CPU seconds of one block's forward pass, a token (median over the trials)."""
        return float(np.median([trial.forward_cpu_s for trial in self.trials]))

    @functools.cached_property
    def _fits(self) -> dict[bool, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        fits = {}
        for recompute in (False, True):
            trials = [trial for trial in self.trials if trial.recompute is recompute]
            samples = np.array([_features(trial.depth, trial.micro_batch) for trial in trials])
            tokens = np.array([_features(trial.depth, trial.micro_batch * self.typical) for trial in trials])
            memory = np.array([trial.peak_mib - trial.base_mib for trial in trials])
            seconds = np.array([trial.step_cpu_s for trial in trials])
            fits[recompute] = (np.linalg.lstsq(samples, memory)[0], np.linalg.lstsq(tokens, seconds)[0])
        return fits

    def fit(self, pack: Pack, *, threads: int, length: int) -> bool:
        """Whether these costs were measured for this pack, these versions and machine, and samples this long."""
        mine = (self.pack, self.kit, self.onnxruntime, self.machine, self.threads)
        return mine == (*_environment(pack), threads) and self.length >= length


def _features(depth: int, load: float) -> NDArray[np.float64]:
    return np.array([1.0, depth, load, depth * load])


def _environment(pack: Pack) -> tuple[str, str, str, str]:
    return (pack.sha256, version("fleetune"), version("onnxruntime"), platform.machine())


def measure(
    pack: Pack,
    data: Path,
    *,
    threads: int,
    lengths: NDArray[np.int64],
    at_once: int = 1,
    micro_batches: tuple[int, int] = (2, 16),
    on_trial: Callable[[int, int], None] = lambda _done, _total: None,
) -> Costs:
    """Run the trials: both policies, at depth 1 and all blocks, with a small and a large micro-batch.

    Args:
        pack: The pack.
        data: The device's data file.
        threads: Threads of ONNX Runtime.
        lengths: Tokens of each sample.
        at_once: Trials side by side: more than one if as many agents are to share the machine, so that they are
            measured as they will run.
        micro_batches: The small and the large one.
        on_trial: Is told how many of the trials are done.

    Raises:
        BudgetError: A trial failed.
    """
    grid = [(r, d, m) for r in (False, True) for d in (1, pack.manifest.blocks) for m in micro_batches]
    length, typical = int(lengths.max()), math.ceil(lengths.mean())
    requests = [Request(str(pack.path), str(data), d, m, length, typical, r, threads) for r, d, m in grid]
    trials = []
    with ThreadPoolExecutor(at_once) as pool:
        on_trial(0, len(grid))
        for trial in pool.map(run_trial, requests):
            trials.append(trial)
            on_trial(len(trials), len(grid))
    return Costs(*_environment(pack), threads, length, typical, tuple(trials))
