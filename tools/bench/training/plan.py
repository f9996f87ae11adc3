"""``fleetune bench plan``: whether predictions hold, and whether rounds survive hard limits and hungry neighbours."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import FileAccessError, RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.messages import encode
from fleetune.edge.resources.costs import Costs, grid, measure
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.limits import LIMITS, Budget
from fleetune.edge.resources.memorywatch import MemoryWatch
from fleetune.edge.resources.planner import options
from fleetune.edge.resources.probes.limitedgroup import LimitedGroup
from fleetune.edge.resources.process import Stopwatch
from fleetune.edge.resources.trial import Request, Trial, run_trial
from fleetune.edge.resources.workload import Workload
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.training.round_worker import RoundSpec
from fleetune.tools.bench.training.spec import Spec
from fleetune.tools.bench.training.tasks import BATCH, TASKS, Task, prepare
from fleetune.tools.bench.training.workers import Worker, round_command
from fleetune.tools.profile.summary import errors

PEERS: dict[str, str] = {}

_PEAK, _WORST_PEAK = Target(0.03, lower=True), Target(0.08, lower=True)
_TIME = Target(0.10, lower=True)
_COST_S = Target(90.0, lower=True)
_GUARD = Target(0.01, lower=True)
_NONE = Target(0.0, lower=True)
_BLOCK = Target(1.0, lower=True)
_NEIGHBOUR_MIB = 300


def bench_plan(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For packs, samples and logs.
        quick: MiniLM alone, on a few cells and rounds.
        peers: None: nobody else predicts.
        threads: Threads of ONNX Runtime.
        say: Is told what happens next.
    """
    del peers
    figures: list[Figure] = []
    notes: list[str] = []
    tasks = TASKS[:1] if quick else (*TASKS, *(replace(task, extractor=True) for task in TASKS[:2]))
    for task in (replace(task, name=_name(task), samples=32) for task in tasks):
        place = folder / task.name.lower().replace(" ", "-").replace(",", "")
        spec = prepare(task, place, threads=threads, say=say)
        pack = Pack.open(Path(spec.pack), verify=False)
        watch = Stopwatch()
        costs = _costs(task, pack, threads, say)
        seconds = watch.read()[0]
        write_atomic(place / "costs.json", encode(costs))
        cells = _cells(pack, 4 if quick else 24)
        figures += _predictions(task, pack, costs, cells, threads, say)
        if task.name == TASKS[0].name:
            figures.append(figure(f"{task.name}: profiling takes", "s", [seconds], target=_COST_S))
            figures.append(_guard(task, costs))
            try:
                figures += _rounds(task, spec, place, pack, costs, 4 if quick else 200, say)
                figures += _neighbour(task, spec, place, 1 if quick else 5, say)
            except FileAccessError as error:
                notes.append(f"no rounds under a hard limit: {error}")
    return Document("plan", tuple(figures), {}, tuple(notes))


def _name(task: Task) -> str:
    return f"{task.name}, pFedMoE" if task.extractor else task.name


def _costs(task: Task, pack: Pack, threads: int, say: Callable[[str], None]) -> Costs:
    return measure(pack, threads=threads, on_trial=lambda done, total: say(f"{task.name}: trial {done} of {total}"))


# --- predictions ----------------------------------------------------------------------------------------------------


def _cells(pack: Pack, count: int) -> list[tuple[bool, int, int, int]]:
    """Random cells that the model was not fitted to."""
    manifest = pack.manifest
    longest = manifest.longest
    lengths = sorted({max(1, longest * eighths // 8) for eighths in (2, 3, 4, 5, 6, 8)}) if manifest.text else [longest]
    known = set(grid(manifest, longest))
    every = itertools.product((False, True), range(1, manifest.blocks + 1), (1, 2, 4, 8, 16), lengths)
    unseen = [cell for cell in every if cell not in known]
    chosen = np.random.default_rng(0).choice(len(unseen), min(count, len(unseen)), replace=False)
    return [unseen[index] for index in chosen]


def _predictions(
    task: Task,
    pack: Pack,
    costs: Costs,
    cells: list[tuple[bool, int, int, int]],
    threads: int,
    say: Callable[[str], None],
) -> list[Figure]:
    """Relative errors on the cells of the fit and on the others."""
    found = list[Trial]()
    for done, (recompute, depth, micro_batch, length) in enumerate(cells):
        say(f"{task.name}: cell {done + 1} of {len(cells)}")
        found.append(_trial(Request(str(pack.path), depth, micro_batch, length, recompute, threads)))
    figures = []
    for what, trials in (("cells of the fit", list(costs.trials)), ("other cells", found)):
        peak, step = errors(costs, trials)
        name = f"{task.name}: {len(trials)} {what}: error of the"
        unseen = what == "other cells"
        figures.append(figure(f"{name} predicted peak, median", "", peak, target=_PEAK if unseen else None))
        worst = figure(f"{name} predicted peak, worst", "", [max(peak)], target=_WORST_PEAK if unseen else None)
        figures += [worst, figure(f"{name} predicted step time, median", "", step, target=_TIME if unseen else None)]
    return figures


def _trial(request: Request) -> Trial:
    """A trial without a limit."""
    trial = run_trial(request)
    if not isinstance(trial, Trial):
        raise RunFailedError("a trial without a limit was killed", "see that nothing else takes all memory")
    return trial


# --- the guard ------------------------------------------------------------------------------------------------------


def _guard(task: Task, costs: Costs) -> Figure:
    """What asking the guard costs, as a share of the cheapest step that a plan of MiniLM at depth 2 would make."""
    watch = MemoryWatch(1e9)
    guard, shares = Guard(1e9, seconds=1e9, excess_mib=watch.excess_mib), list[float]()
    step_s = costs.model.step_s(2, task.micro_batch, costs.length, recompute=False)[0] * BATCH / task.micro_batch
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            guard.before_step((0.0, 0.0))
        shares.append((time.perf_counter() - start) / 200 / step_s)
    watch.close()
    return figure(f"{task.name}: the guard, of an optimiser step at depth 2", "", shares, target=_GUARD)


# --- rounds under a hard limit --------------------------------------------------------------------------------------


def _rounds(
    task: Task, spec: Spec, place: Path, pack: Pack, costs: Costs, count: int, say: Callable[[str], None]
) -> list[Figure]:
    """Rounds with random budgets, each in a control group that has exactly the budget."""
    workload = Workload.of(
        read_dataset(Path(spec.data), pack), pack.manifest, epochs=1, batch=BATCH, max_depth=pack.manifest.blocks
    )
    every = options(costs, workload, Budget(1e9))
    memory = next(limit for limit in LIMITS if limit.name == "memory")
    least, most = (pick(memory.need(option.plan) for option in every) for pick in (min, max))
    smallest = {  # one sample at once, nothing kept
        depth: _trial(Request(str(pack.path), depth, 1, workload.longest, True, spec.threads)).peak_mib
        for depth in range(1, pack.manifest.blocks + 1)
    }
    rng = np.random.default_rng(0)
    budgets = rng.uniform(1.03 * least, 1.1 * most, count)
    kills, shallower, over, swapped = 0, list[float](), list[float](), psutil.swap_memory().used
    for number, budget in enumerate(budgets.tolist()):
        say(f"{task.name}: round {number + 1} of {count}, {budget:.0f} MiB")
        found, killed = _one_round(spec, place, budget, budget, epochs=1)
        kills += killed
        if found is None or found["waits"]:
            shallower.append(float(pack.manifest.blocks))
            continue
        feasible = max((depth for depth, peak in smallest.items() if peak <= budget), default=1)
        shallower.append(float(feasible - found["depth"]))
        over.append(found["peak_mib"] / budget)
    grown = (psutil.swap_memory().used - swapped) / 2**20
    name = f"{task.name}: {count} rounds under a hard limit of {min(budgets):.0f} to {max(budgets):.0f} MiB"
    return [
        figure(f"{name}: OOM kills", "", [float(kills)], target=_NONE),
        figure(f"{name}: growth of swap", "MiB", [max(0.0, grown)], target=_NONE),
        figure(f"{name}: blocks below the deepest that fits, most", "", [max(shallower)], target=_BLOCK),
        figure(f"{name}: the process's peak, of its budget", "", over),
    ]


def _one_round(
    spec: Spec,
    place: Path,
    budget_mib: float,
    limit_mib: float,
    *,
    epochs: int,
    meanwhile: Callable[[Any], None] | None = None,
) -> tuple[dict[str, Any] | None, bool]:
    """What a round reports, None if it died; and whether the kernel killed anybody in its group."""
    with LimitedGroup(limit_mib) as group:
        asked = RoundSpec(
            pack=spec.pack,
            data=spec.data,
            costs=str(place / "costs.json"),
            state=str(place / "agent"),
            memory_mib=budget_mib,
            threads=spec.threads,
            epochs=epochs,
            group=str(group.folder),
        )
        found: dict[str, Any] | None
        try:
            with Worker("a round", round_command(place, asked), place / "log.txt") as worker:
                neighbour = threading.Thread(target=meanwhile, args=[group]) if meanwhile else None
                if neighbour is not None:
                    neighbour.start()
                found = worker.ask("round")
                if neighbour is not None:
                    neighbour.join()
        except RunFailedError:
            found = None
        return found, bool(group.oom_kills)


def _neighbour(task: Task, spec: Spec, place: Path, count: int, say: Callable[[str], None]) -> list[Figure]:
    """Rounds in whose middle another process takes 300 MiB, of which a third is not there."""
    updates, kills, eased = list[float](), list[float](), list[float]()
    limit = _NEIGHBOUR_MIB + 220.0
    for number in range(count):
        say(f"{task.name}: a neighbour, {number + 1} of {count}")
        found, killed = _one_round(spec, place, limit, limit, epochs=80, meanwhile=_take)
        updates.append(float(bool(found and found.get("tensors"))))
        eased.append(float(found["eased"]) if found else 0.0)
        kills.append(float(killed))
    name = f"{task.name}: a neighbour takes {_NEIGHBOUR_MIB} MiB in mid-round"
    return [
        figure(f"{name}: rounds that end with an update", "", updates, target=Target(1.0, lower=False)),
        figure(f"{name}: times that the guard asks for less", "", eased, target=Target(1.0, lower=False)),
        figure(f"{name}: OOM kills", "", kills, target=_NONE),
    ]


def _take(group: LimitedGroup) -> None:
    time.sleep(2.0)
    with hog(_NEIGHBOUR_MIB, group):
        time.sleep(3.0)


@contextmanager
def hog(mib: int, group: LimitedGroup, seconds: float = 4.0) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group that takes so much memory in so many seconds, and holds it."""
    script = (
        "import signal, sys, time; sys.stdin.readline(); held = []\n"
        f"for _ in range(60): held.append(b'x' * ({mib} * (1 << 20) // 60)); time.sleep({seconds} / 60)\n"
        "print(len(held), flush=True); signal.pause()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        group.add(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()
