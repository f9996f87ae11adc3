"""``fleetune bench infer``: answers one sample at a time, beside PEFT on torch, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.peers import peer_versions, peers_python
from fleetune.tools.bench.training.tasks import TASKS, Task, prepare
from fleetune.tools.bench.training.workers import REST_S, Worker, engine_command, peft_command

PEERS = {"same": "PEFT fp32"}
OURS = "Fleetune"

_MIXTURE = Target(1.35, lower=True)


@dataclass
class _Runs:
    """What one contender did, a list entry a repeat."""

    start_s: list[float] = field(default_factory=list)
    mixture_ms: list[float] = field(default_factory=list)
    one_ms: list[float] = field(default_factory=list)
    both_ms: list[tuple[float, float]] = field(default_factory=list)
    """With the mixture and with one expert, sample by sample in turns."""
    peak_mib: list[float] = field(default_factory=list)


def bench_infer(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For packs, samples and logs.
        quick: MiniLM alone, with fewer samples and repeats.
        peers: Keys of :data:`PEERS`.
        threads: Threads of every contender.
        say: Is told what happens next.
    """
    names = [PEERS[key] for key in peers]
    python = peers_python(say) if names else None
    tasks = [replace(TASKS[0], samples=16)] if quick else [replace(task, samples=64) for task in TASKS]
    figures: list[Figure] = []
    for task in tasks:
        place = folder / task.name.lower().replace(" ", "-")
        spec = msgspec.structs.replace(prepare(task, place, threads=threads, say=say), trains=False)
        commands = {OURS: engine_command(place, OURS, spec)}
        for name in names:
            assert python is not None
            commands[name] = peft_command(place, name, spec, python)
        runs = {name: _Runs() for name in commands}
        repeats = 2 if quick else 5
        for repeat in range(repeats):
            say(f"{task.name}: repeat {repeat + 1} of {repeats}")
            _repeat(commands, runs, place)
        figures += _figures(task, runs, names)
    return Document("infer", tuple(figures), peer_versions(python) if python else {})


def _repeat(commands: dict[str, list[str]], runs: dict[str, _Runs], place: Path) -> None:
    """Start every contender anew; in turns, each answers all samples as a mixture, then with one expert."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, command in commands.items():
            workers[name] = stack.enter_context(Worker(name, command, place / "log.txt"))
        for request in ("mixture", "one"):
            for name, worker in workers.items():
                time.sleep(REST_S)
                found = worker.ask(request)
                getattr(runs[name], f"{request}_ms").append(found["median_ms"])
                if request == "mixture":
                    runs[name].start_s.append(worker.started_s + found["first_s"])
                    runs[name].peak_mib.append(worker.ask("peak")["peak_mib"])
        both = workers[OURS].ask("both")
        runs[OURS].both_ms.append((both["mixture"], both["global"]))


def _figures(task: Task, runs: dict[str, _Runs], peers: Sequence[str]) -> list[Figure]:
    ours = runs[OURS]
    title = f"{task.name}: a mixture's answer, sample by sample in turns"
    mixture, one = zip(*ours.both_ms, strict=True)
    found = [figure(title, "ms", mixture, peer="one expert's: a full pass", peer_values=one, target=_MIXTURE)]
    contenders: list[str | None] = [*peers] or [None]
    for peer in contenders:
        theirs = runs[peer] if peer else None

        def add(name: str, unit: str, key: str, peer: str | None = peer, theirs: _Runs | None = theirs) -> None:
            values = getattr(theirs, key) if theirs else None
            found.append(figure(f"{task.name}: {name}", unit, getattr(ours, key), peer=peer, peer_values=values))

        add("a mixture's answer to one sample", "ms", "mixture_ms")
        add("one expert's answer to one sample", "ms", "one_ms")
        add("start until a mixture's first answer", "s", "start_s")
        add("peak memory of a mixture's process", "MiB", "peak_mib")
    return found
