"""A device's measured costs for one pack; :mod:`fleetune.edge.resources.costmodel` extends them to every plan."""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, BudgetError, ConfigError
from fleetune.edge.protocol.files import read_bytes
from fleetune.edge.resources.powermode import POWER_MODE, cores_of, read_power_mode
from fleetune.edge.resources.trial import Request, Trial, run_trial

if TYPE_CHECKING:
    from fleetune.edge.pack.manifest import Manifest
    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.resources.costmodel import CostModel

MAX_COSTS = 4 << 20
"""Largest file of costs in bytes."""


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
    def length(self) -> int:
        """Tokens of the longest samples that were measured."""
        return max(trial.length for trial in self.trials)

    @functools.cached_property
    def model(self) -> CostModel:
        """What extends the trials to every plan."""
        from fleetune.edge.resources.costmodel import CostModel  # NumPy: who only reads a profile needs none

        return CostModel(self.trials)

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
