"""``fleetune bench bytes``: what a round costs on the link, for every codec, at which accuracy.

The demo's task and methods, device after device in this process; what travels is encoded and decoded by the code that
an agent and the aggregator use, and nothing of it is estimated.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import msgspec

from fleetune.edge.agent.feedback import encode_with_feedback
from fleetune.edge.agent.rounds import Rounds, RoundsConfig
from fleetune.edge.agent.state import State
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import COMPRESSED, NUMBERS, Codec, Tensors, add_differences
from fleetune.edge.protocol.codec.entropy import compress
from fleetune.edge.protocol.messages import Announcement, UpdateManifest, seal
from fleetune.edge.resources.costs import Costs, measure
from fleetune.edge.resources.limits import Budget
from fleetune.edge.resources.process import machine_memory_mib
from fleetune.server.globals import Globals
from fleetune.server.job import Job
from fleetune.server.journal import Accepted, Typical
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import norm_of
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, trains
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.learning.held import HeldRound
from fleetune.tools.commands.serve import add_job_options
from fleetune.tools.demo.task import Task
from fleetune.tools.jobs import build_jobs

PEERS: dict[str, str] = {}

DEPTHS = {"nano-2gb": 3, "nano-4gb": 1, "orin-nano": 4, "pi-5": 2}
"""Device of the demo's fleet → the depth that its budget leaves it there."""

_SEEDS = (0, 1, 2)
_BOTH = "both ways"
_TARGET = Target(20.0, lower=False)
_POINTS = Target(-0.005, lower=False)


@dataclass(frozen=True)
class Variant:
    """One way to run the task.

    Attributes:
        name: For people.
        codec: How tensors become bytes, both ways; without compression, which changes no value.
        sal: Whether depth follows the devices' budgets and SAL's schedule; else every block is trained from the start.
    """

    name: str
    codec: str
    sal: bool = True


BASELINE = Variant("float32, all blocks", "f32", sal=False)
VARIANTS = tuple(Variant(name, name) for name in NUMBERS)


@dataclass
class _Result:
    """KiB a round of training and device, up and down, as they are and compressed; and the final accuracy."""

    kib: dict[str, float] = field(default_factory=dict)
    accuracy: float = 0.0

    def sent(self, way: str, ending: str = "") -> float:
        """KiB of a way, or of both."""
        return sum(self.kib[one + ending] for one in ("up", "down") if way in (one, _BOTH))


def bench_bytes(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For the pack, samples and states.
        quick: One seed, the baseline and int4 alone.
        peers: None: nobody else is measured.
        threads: Threads of ONNX Runtime.
        say: Is told what happens next.
    """
    del peers
    seeds = _SEEDS[:1] if quick else _SEEDS
    variants = [BASELINE, *(VARIANTS[-1:] if quick else VARIANTS)]
    found: dict[str, list[_Result]] = {variant.name: [] for variant in variants}
    say("packs the backbone")
    Task("text", None, 300, 75, 150, 0).write_pack(folder / "pack")
    pack = Pack.open(folder / "pack")
    costs: Costs | None = None
    for seed in seeds:
        data = {device: folder / f"{seed}-{device}.jsonl" for device in DEPTHS}
        Task("text", None, 300, 75, 150, seed).write_data(list(data.values()))
        if costs is None:
            longest = max(int(read_dataset(file, pack).lengths.max()) for file in data.values())
            costs = measure(
                pack, threads=threads, longest=longest, on_trial=lambda done, all_: say(f"trial {done} of {all_}")
            )
        for variant in variants:
            say(f"seed {seed}: {variant.name}")
            found[variant.name].append(_run(variant, seed, pack, data, costs, threads))
    return Document("bytes", tuple(_figures(found)), {}, (f"{len(seeds)} seeds, {len(DEPTHS)} devices",))


def _figures(found: Mapping[str, list[_Result]]) -> list[Figure]:
    figures = list[Figure]()
    base = found[BASELINE.name]
    for name, results in found.items():
        is_base = name == BASELINE.name
        figures.append(figure(f"{name}: final accuracy", "", [result.accuracy for result in results]))
        if not is_base:
            pairs = zip(results, base, strict=True)
            gained = fmean(result.accuracy - before.accuracy for result, before in pairs)
            figures.append(figure(f"{name}: accuracy beyond {BASELINE.name}, mean", "", [gained], target=_POINTS))
        for ending in ("", COMPRESSED):
            for way in ("up", "down", _BOTH):
                sent = [result.sent(way, ending) for result in results]
                whole = None if is_base and not ending else [result.sent(way) for result in base]
                figures.append(
                    figure(
                        f"{name}{ending}: a round and device, {way}",
                        "KiB",
                        sent,
                        peer=None if whole is None else BASELINE.name,
                        peer_values=whole,
                        target=_TARGET if (name, ending, way) == ("int4", COMPRESSED, _BOTH) else None,
                    )
                )
    return figures


def _run(variant: Variant, seed: int, pack: Pack, data: Mapping[str, Path], costs: Costs, threads: int) -> _Result:
    """Run FedMS to its end."""
    scratch = Path(tempfile.mkdtemp(prefix="fleetune-bytes-"))
    try:
        return _Fleet(variant, seed, pack, data, costs, threads, scratch).run()
    finally:
        shutil.rmtree(scratch)


class _Fleet:
    def __init__(
        self,
        variant: Variant,
        seed: int,
        pack: Pack,
        data: Mapping[str, Path],
        costs: Costs,
        threads: int,
        scratch: Path,
    ) -> None:
        self._variant, self._pack = variant, pack
        self._job = _job(variant, seed, pack)
        self._states = {device: State(scratch / device, device) for device in data}
        budget = Budget(machine_memory_mib())
        self._workers = {
            device: Rounds(RoundsConfig(pack.path, file, budget, threads, (costs,)), device)
            for device, file in data.items()
        }
        for device, worker in self._workers.items():
            worker.prepare(self._states[device], _quiet)
        self._lost = dict.fromkeys(data, Tensors())
        self._sent: dict[str, int] = {}

    def run(self) -> _Result:
        strategy = STRATEGIES["fedms"](self._job)
        globals_, closed, told = Globals(self._job.codec), list[ClosedRound](), Tensors()
        typical = dict[str, Typical]()
        while (plan := strategy.next(closed)) is not None:
            _, changes = globals_.tell(plan.broadcast)
            if changes is not None:
                data = globals_.payloads[changes.sha256]
                told = add_differences(told, Codec.named(changes.codec).decode(data, self._job.shapes))
                self._count("down", data)
            announced = Announcement(
                fleet="bench",
                run="bench",
                job=self._job.id,
                version=len(closed),
                method="fedms",
                stage=plan.stage,
                round=sum(trains(past.stage) for past in closed) + trains(plan.stage),
                rounds=strategy.rounds,
                backbone=self._job.backbone,
                quantisation=self._job.quantisation,
                settings={**self._job.settings, "depth": plan.depth},
                issued=0.0,
                expires=0.0,
                changes=changes,
            )
            opened = HeldRound(announced, plan, self._job.rule, typical.get(plan.stage))
            self._count("down", beside=len(seal(announced)))
            for device in self._workers:
                self._answer(device, announced, told, opened)
            globals_.add(opened.gain())
            closed.append(ClosedRound(plan.stage, opened.means()))
            if opened.typical is not None:
                typical[plan.stage] = opened.typical
        for worker in self._workers.values():
            worker.close()
        for state in self._states.values():
            state.close()
        # What goes down goes once, and each device receives it; what goes up is counted over all of them.
        share = {"up": strategy.rounds * len(self._workers), "down": strategy.rounds}
        kib = {way: size / share[way.removesuffix(COMPRESSED)] / 1024 for way, size in self._sent.items()}
        return _Result(kib, closed[-1].means["test_mixture"])

    def _answer(self, device: str, announced: Announcement, told: Tensors, opened: OpenRound) -> None:
        worker, codec = self._workers[device], Codec.named(self._variant.codec)
        depth = int(announced.settings["depth"])
        if self._variant.sal:
            depth = min(DEPTHS[device], depth)
        own = msgspec.structs.replace(announced, settings={**announced.settings, "depth": depth})
        assert not worker.hindrance(own)
        answer = worker.answer(own, dict(told), _quiet, _quiet)
        data = b""
        if answer.tensors:
            data, self._lost[device] = encode_with_feedback(answer.tensors, self._lost[device], codec)
        manifest = UpdateManifest(
            fleet="bench",
            device=device,
            update=f"bench-{announced.job}-{announced.version}",
            run="bench",
            job=announced.job,
            version=announced.version,
            issued=0.0,
            backbone=announced.backbone,
            samples=worker.samples,
            metrics=dict(answer.metrics),
            payload=chunks.describe(data, codec.name) if data else None,
        )
        if data:
            self._count("up", data)
        self._count("up", beside=len(seal(manifest)))
        arrived = codec.decode(data, self._job.shapes) if data else {}
        opened.add(Accepted(manifest, 0.0, announced.version, norm=norm_of(arrived)), arrived)

    def _count(self, way: str, data: bytes = b"", *, beside: int = 0) -> None:
        """Count bytes, as they are and compressed: that changes no value, so one run shows both."""
        for ending, size in (("", len(data)), (COMPRESSED, len(compress(data)) if data else 0)):
            self._sent[way + ending] = self._sent.get(way + ending, 0) + size + beside


def _job(variant: Variant, seed: int, pack: Pack) -> Job:
    parser = argparse.ArgumentParser()
    add_job_options(parser, max_depth=4)
    words = ["--seed", str(seed)]
    if not variant.sal:
        blocks = str(pack.manifest.blocks)
        words += ["--max-depth", blocks, "--sal-start", blocks]
    (job,) = build_jobs(parser.parse_args(words), pack.manifest, classes=2)
    return replace(job, codec=variant.codec)


def _quiet(*_said: object) -> None:
    pass
