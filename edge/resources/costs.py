"""A device's measured costs for one pack, and the model that extends them to every plan.

At a fixed sequence length both peak memory and the time of a step are, for each activation policy, bilinear in
depth and micro-batch: a constant, weights a block, activations a sample, activations a sample and block. Trials at
the four corners of the grid determine those four coefficients.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
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
        typical: Tokens of a usual sample, at which time was measured.
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

    def peak_mib(self, depth: int, micro_batch: int, *, recompute: bool) -> float:
        """Predicted peak of the process in MiB."""
        return float(_features(depth, micro_batch) @ self._fits[recompute][0])

    def step_cpu_s(self, depth: int, micro_batch: int, *, recompute: bool) -> float:
        """Predicted CPU seconds of one forward and backward pass of a micro-batch."""
        return float(_features(depth, micro_batch) @ self._fits[recompute][1])

    @functools.cached_property
    def forward_cpu_s(self) -> float:
        """CPU seconds of one block's forward pass, a sample (median over the trials)."""
        return float(np.median([trial.forward_cpu_s for trial in self.trials]))

    @functools.cached_property
    def _fits(self) -> dict[bool, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        fits = {}
        for recompute in (False, True):
            trials = [trial for trial in self.trials if trial.recompute is recompute]
            matrix = np.array([_features(trial.depth, trial.micro_batch) for trial in trials])
            memory = np.array([trial.peak_mib for trial in trials])
            seconds = np.array([trial.step_cpu_s for trial in trials])
            fits[recompute] = (np.linalg.lstsq(matrix, memory)[0], np.linalg.lstsq(matrix, seconds)[0])
        return fits

    def fit(self, pack: Pack, *, threads: int, length: int) -> bool:
        """Whether these costs were measured for this pack, these versions and machine, and samples this long."""
        mine = (self.pack, self.kit, self.onnxruntime, self.machine, self.threads)
        return mine == (*_environment(pack), threads) and self.length >= length


def _features(depth: int, micro_batch: int) -> NDArray[np.float64]:
    return np.array([1.0, depth, micro_batch, depth * micro_batch])


def _environment(pack: Pack) -> tuple[str, str, str, str]:
    return (pack.sha256, version("fleetune"), version("onnxruntime"), platform.machine())


def measure(
    pack: Pack,
    data: Path,
    *,
    threads: int,
    length: int,
    typical: int,
    micro_batches: tuple[int, int] = (2, 16),
    on_trial: Callable[[int, int], None] = lambda _done, _total: None,
) -> Costs:
    """Run the trials: both policies, at depth 1 and all blocks, with a small and a large micro-batch.

    Args:
        pack: The pack.
        data: The device's data file.
        threads: Threads of ONNX Runtime.
        length: Tokens of the longest sample.
        typical: Tokens of a usual sample.
        micro_batches: The small and the large one.
        on_trial: Is told how many of the trials are done.

    Raises:
        BudgetError: A trial failed.
    """
    grid = [(r, d, m) for r in (False, True) for d in (1, pack.manifest.blocks) for m in micro_batches]
    trials = []
    for done, (recompute, depth, micro_batch) in enumerate(grid):
        on_trial(done, len(grid))
        request = Request(str(pack.path), str(data), depth, micro_batch, length, typical, recompute, threads)
        trials.append(run_trial(request))
    on_trial(len(grid), len(grid))
    return Costs(*_environment(pack), threads, length, typical, tuple(trials))
