"""``fleetune bench step``: training adapters, beside PEFT on torch, in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import FleetuneError
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.peers import peer_versions, peers_python
from fleetune.tools.bench.training.idle import idle_mib
from fleetune.tools.bench.training.spec import Spec
from fleetune.tools.bench.training.tasks import LENGTH, TASKS, Task, pack_for, prepare
from fleetune.tools.bench.training.workers import REST_S, Worker, engine_command, peft_command, rate_command

ALL, SAME, QLORA = "PEFT fp32, all blocks", "PEFT fp32, same blocks", "PEFT NF4, all blocks"
QLORA_SAME = "PEFT NF4, same blocks"
PEERS = {"all": ALL, "same": SAME, "nf4": QLORA}
OURS = "Fleetune"

_TARGETS: dict[tuple[str, str], dict[str, Target]] = {
    ("MiniLM", "peak_mib"): {ALL: Target(1 / 6, lower=True), SAME: Target(1 / 5, lower=True)},
    ("MiniLM", "later_s"): {ALL: Target(3.8, lower=False), SAME: Target(2.4, lower=False)},
    ("ViT 56 px", "later_s"): {ALL: Target(5.0, lower=False), SAME: Target(3.0, lower=False)},
    **{(task.name, "start_s"): {QLORA: Target(0.1, lower=True)} for task in TASKS},
}
"""Task and figure → peer → what is asked of the ratio."""

_SHARE = Target(0.75, lower=False)
_GROWTH = Target(1.0, lower=True)
_IDLE = Target(45.0, lower=True)
_LOSS = 0.01


@dataclass
class _Runs:
    """What one contender did, a list entry a repeat."""

    start_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    later_s: list[float] = field(default_factory=list)
    later_cpu_s: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    gflops: list[float] = field(default_factory=list)
    growth_mib: list[float] = field(default_factory=list)
    where_ms: list[dict[str, float]] = field(default_factory=list)


_MEASURED = (
    ("peak_mib", "peak memory", "MiB"),
    ("start_s", "start until ready to train", "s"),
    ("first_s", "first epoch", "s"),
    ("later_s", "later epoch", "s"),
    ("later_cpu_s", "CPU seconds of a later epoch", "s"),
)
"""Field of :class:`_Runs`, name and unit of each figure."""


def bench_step(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For packs, samples and logs.
        quick: MiniLM alone, on fewer samples and repeats.
        peers: Keys of :data:`PEERS`.
        threads: Threads of every contender.
        say: Is told what happens next.
    """
    names = [PEERS[key] for key in peers]
    python = peers_python(say) if names else None
    tasks = [replace(TASKS[0], samples=48)] if quick else list(TASKS)
    figures: list[Figure] = []
    notes: list[str] = []
    for task in tasks:
        place = folder / task.name.lower().replace(" ", "-")
        spec = prepare(task, place, threads=threads, say=say)
        blocks = Pack.open(Path(spec.pack), verify=False).manifest.blocks
        commands = {OURS: engine_command(place, OURS, spec)}
        for name in names:
            assert python is not None
            theirs = msgspec.structs.replace(
                spec, depth=spec.depth if name == SAME else blocks, quantised=name == QLORA
            )
            commands[name] = peft_command(place, name, theirs, python)
        repeats, epochs = (2, 2) if quick else (5, 3)
        runs = {name: _Runs() for name in commands}
        for repeat in range(repeats):
            say(f"{task.name}: repeat {repeat + 1} of {repeats}")
            thousand = task == TASKS[0] and repeat == 0 and not quick
            _repeat(commands, runs, place, epochs, threads=threads, thousand=thousand)
        figures += _figures(task, spec, runs, names)
        if python is not None:
            say(f"{task.name}: losses")
            figures += _losses(task, spec, place, epochs, python)
        if task.backbone == "minilm":
            say("an agent that waits")
            try:
                idle = idle_mib(spec, place, repeats)
            except FleetuneError as error:  # the other figures took long to measure
                notes.append(f"an agent that waits for a round was not measured: {error}")
            else:
                figures.append(figure("an agent that waits for a round: memory", "MiB", idle, target=_IDLE))
    return Document("step", tuple(figures), peer_versions(python) if python else {}, tuple(notes))


def _repeat(
    commands: dict[str, list[str]], runs: dict[str, _Runs], place: Path, epochs: int, *, threads: int, thousand: bool
) -> None:
    """Start every contender anew, then let them train in turns; at the end ours may do a thousand steps more."""
    shutil.rmtree(place / "cache", ignore_errors=True)  # so that the first epoch is one
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, command in commands.items():
            workers[name] = stack.enter_context(Worker(name, command, place / "log.txt"))
            runs[name].start_s.append(workers[name].started_s)
        product = stack.enter_context(Worker("a matrix product", rate_command(threads), place / "log.txt"))
        for epoch in range(epochs):
            for name, worker in workers.items():
                time.sleep(REST_S)
                found = worker.ask("epoch")
                if epoch == 0:
                    runs[name].first_s.append(found["seconds"])
                else:
                    runs[name].later_s.append(found["seconds"])
                    runs[name].later_cpu_s.append(found["cpu_s"])
                    if name == OURS:  # at once: other work on the machine slows both
                        runs[name].gflops.append(product.ask("rate")["gflops"])
        for name, worker in workers.items():
            runs[name].peak_mib.append(worker.ask("peak")["peak_mib"])
        runs[OURS].where_ms.append(workers[OURS].ask("where")["ms"])
        if thousand:
            runs[OURS].growth_mib.append(workers[OURS].ask("thousand")["growth_mib"])


def _figures(task: Task, spec: Spec, runs: dict[str, _Runs], peers: Sequence[str]) -> list[Figure]:
    ours = runs[OURS]
    found: list[Figure] = []
    contenders: list[str | None] = [*peers] or [None]
    for peer in contenders:
        for key, name, unit in _MEASURED:
            target = _TARGETS.get((task.name, key), {}).get(peer) if peer else None
            theirs = getattr(runs[peer], key) if peer else None
            title = f"{task.name}: {name}"
            found.append(figure(title, unit, getattr(ours, key), peer=peer, peer_values=theirs, target=target))
    epoch = _flops(spec) * task.samples / 1e9
    share = [epoch / seconds / rate for seconds, rate in zip(ours.later_s, ours.gflops, strict=True)]
    found.append(figure(f"{task.name}: share of the arithmetic limit", "", share, target=_SHARE))
    for kind in ours.where_ms[0]:
        found.append(figure(f"{task.name}: of a step, {kind}", "ms", [run[kind] for run in ours.where_ms]))
    if ours.growth_mib:
        title = f"{task.name}: growth of the process over 1,000 steps"
        found.append(figure(title, "MiB", ours.growth_mib, target=_GROWTH))
    return found


def _losses(task: Task, spec: Spec, place: Path, epochs: int, python: Path) -> Iterator[Figure]:
    """Ours beside PEFT's on the same blocks, weights of the same format: each run is repeatable, so once is enough."""
    fp32 = str(pack_for(task, place / "pack-fp32", "fp32").path)
    for peer, ours, quantised in ((QLORA_SAME, spec, True), (SAME, msgspec.structs.replace(spec, pack=fp32), False)):
        commands = {
            OURS: engine_command(place, f"{OURS} beside {peer}", ours),
            peer: peft_command(place, peer, msgspec.structs.replace(spec, quantised=quantised), python),
        }
        found: dict[str, float] = {}
        for name, command in commands.items():
            with Worker(name, command, place / "log.txt") as worker:
                for _ in range(epochs):
                    found[name] = worker.ask("epoch")["loss"]
        title = f"{task.name}: loss of the last epoch, {'NF4' if quantised else 'fp32'} weights"
        plain = figure(title, "nats", [found[OURS]], peer=peer, peer_values=[found[peer]])
        assert plain.ratio is not None
        yield replace(plain, target=f"1 ± {_LOSS}", met=abs(plain.ratio - 1) <= _LOSS)


def _flops(spec: Spec) -> float:
    """Floating-point operations of a training step, for each sample: products only, two for each multiply and add.

    Of t tokens of width d, a ask: all of them, but in a vision transformer's last block only the class token. Forward,
    keys and values take 4 t d², the other linear maps 20 a d² (the hidden layer being 4 d wide), attention 4 a t d.
    Backward, only activations take gradients, the weights being frozen: as much again for the maps and twice for
    attention; in the lowest active block no gradient leaves the block, which saves the maps before attention.
    """
    manifest = Pack.open(Path(spec.pack), verify=False).manifest
    t = LENGTH if manifest.image is None else (manifest.image.size // manifest.image.patch) ** 2 + 1
    d, total = manifest.width, 0
    for block in range(spec.depth):
        a = 1 if manifest.image is not None and block == spec.depth - 1 else t
        maps, attention = (4 * t + 20 * a) * d * d, 4 * a * t * d
        total += maps + attention
        total += 18 * a * d * d + attention * 3 // 2 if block == 0 else maps + 2 * attention
        total += len(manifest.targets) * 3 * 4 * t * d * manifest.rank
    return float(total)
