"""``fleetune bench privacy``: what privacy costs in accuracy, by ε, by the number of devices, and by what gets noise.

Many small devices, one after the other in this process: the methods, the mechanism, the codec, the sums and the account
of privacy are those of an agent and of the aggregator. All devices share one backbone, and what is frozen is computed
once for all variants.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from fleetune.edge.agent.feedback import encode_with_feedback
from fleetune.edge.agent.privacy import PrivacyLimits, make_private
from fleetune.edge.agent.state import JobStore
from fleetune.edge.agent.worker import Answer
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.engine.expert import Factors
from fleetune.edge.methods.base import Device, ExpertSettings, Round
from fleetune.edge.methods.baselines.frozen_head import FrozenHead
from fleetune.edge.methods.fedms.method import FedMS
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import Codec, Tensors, add_differences
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial
from fleetune.server.accountant import noise_for
from fleetune.server.globals import Globals
from fleetune.server.job import Job, JobPrivacy
from fleetune.server.journal import Accepted, Typical
from fleetune.server.privacy import Account, Guarantee
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds, norm_of
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, NextRound, trains
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.learning.held import HeldRound
from fleetune.tools.bench.learning.privacy_picture import Line, draw
from fleetune.tools.commands.serve import add_job_options
from fleetune.tools.demo.task import Task
from fleetune.tools.jobs import build_jobs
from fleetune.tools.privacy import CLIP, DELTA, GATE_CLIP

PEERS: dict[str, str] = {}

EPSILONS = (math.inf, 8.0, 4.0, 2.0, 1.0)
"""Against whoever has the model; infinite is no noise."""

EXPERTS = {"test_global": "global expert", "test_mixture": "mixture"}
"""Metric of an evaluation → what it is the accuracy of."""

_DEPTH, _MICRO_BATCH = 1, 16
_RATE = 0.004
"""Twice the default: with B alone, half of what could learn does not, and noise leaves no time to be careful."""
_ALONE = "head on the frozen backbone"
_NOT_LESS = Target(0.0, lower=False)


@dataclass(frozen=True)
class Extent:
    """How much is run.

    Attributes:
        seeds: Seeds of data, initial values and order.
        fleets: Numbers of devices; a smaller fleet is a part of the largest.
        both: The fleet that is also run with noise on both factors.
        epsilons: What privacy is asked for.
        rounds: Rounds of stage 1 and of stage 2.
        train: Training samples of a device.
        test: Test samples.
    """

    seeds: tuple[int, ...]
    fleets: tuple[int, ...]
    both: int
    epsilons: tuple[float, ...]
    rounds: tuple[int, int]
    train: int = 40
    test: int = 20


FULL = Extent((0, 1, 2), (20, 100), 100, EPSILONS, (10, 2))
QUICK = Extent((0,), (20,), 20, (math.inf, 4.0), (2, 1))


@dataclass(frozen=True)
class Variant:
    """One way to run the task.

    Attributes:
        devices: In the fleet.
        factors: What is trained together, and gets noise.
        epsilon: After all rounds, against whoever has the model.
    """

    devices: int
    factors: Factors
    epsilon: float

    @property
    def name(self) -> str:
        """For people."""
        what = {"B": "one factor", "AB": "both factors"}[self.factors]
        return f"{self.devices} devices, {what}, {'no noise' if math.isinf(self.epsilon) else f'ε {self.epsilon:g}'}"


@dataclass(frozen=True)
class _Result:
    """Accuracies of the last round, mean over the devices, and what was guaranteed."""

    accuracy: dict[str, float]
    guarantee: Guarantee | None


def bench_privacy(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For the pack, samples, caches and the picture.
        quick: One seed, 20 devices, three rounds.
        peers: None: nobody else is measured.
        threads: Threads of ONNX Runtime.
        say: Is told what happens next.
    """
    del peers
    say("packs the backbone")
    Task("images", None, 1, 1, 1, 0).write_pack(folder / "pack")
    return run(QUICK if quick else FULL, Pack.open(folder / "pack"), folder, threads, say)


def run(extent: Extent, pack: Pack, folder: Path, threads: int, say: Callable[[str], None]) -> Document:
    """Run so much with a pack for pictures; the picture of what came out lands in the folder."""
    backbone = Backbone(pack, threads)
    task = Task("images", None, extent.train, 1, extent.test, 0)
    variants = [Variant(devices, "B", epsilon) for devices in extent.fleets for epsilon in extent.epsilons]
    variants += [Variant(extent.both, "AB", epsilon) for epsilon in extent.epsilons]
    found, alone = dict[Variant, list[_Result]](), dict[int, list[float]]()
    for seed in extent.seeds:
        fleet = _Fleet(extent, backbone, replace(task, seed=seed), folder / str(seed))
        for devices in extent.fleets:
            say(f"seed {seed}: {devices} devices, each alone")
            alone.setdefault(devices, []).append(fleet.alone(devices))
        for variant in variants:
            say(f"seed {seed}: {variant.name}")
            found.setdefault(variant, []).append(fleet.run(variant))
        shutil.rmtree(folder / str(seed))
    picture = folder / "privacy.png"
    draw(picture, _lines(extent, found), fmean(alone[max(extent.fleets)]))
    rounds = f"{extent.rounds[0]} + {extent.rounds[1]} rounds"
    about = f"{len(extent.seeds)} seeds, {extent.train} samples a device, {rounds}, clip {CLIP:g}, δ = {DELTA:g}"
    return Document("privacy", tuple(_figures(extent, found, alone)), {}, (about, f"the picture is {picture}"))


def _figures(extent: Extent, found: dict[Variant, list[_Result]], alone: dict[int, list[float]]) -> list[Figure]:
    figures = [figure(f"{devices} devices, each alone: {_ALONE}", "", values) for devices, values in alone.items()]
    for variant, results in found.items():
        free = found[replace(variant, epsilon=math.inf)]
        for metric, expert in EXPERTS.items():
            values, without = ([result.accuracy[metric] for result in some] for some in (results, free))
            peer = None if results is free else "no noise"
            figures.append(
                figure(f"{variant.name}: {expert}", "", values, peer=peer, peer_values=without if peer else None)
            )
        if (guarantee := results[0].guarantee) is not None:
            seen = [guarantee.epsilon["aggregator"]]
            figures.append(figure(f"{variant.name}: ε against the aggregator", "", seen))
    for epsilon in extent.epsilons:
        one, both = (found[Variant(extent.both, factors, epsilon)] for factors in ("B", "AB"))
        pairs = zip(one, both, strict=True)
        gained = [a.accuracy["test_global"] - b.accuracy["test_global"] for a, b in pairs]
        name = f"{Variant(extent.both, 'B', epsilon).name}: global expert, beyond both factors"
        figures.append(figure(name, "", gained, target=None if math.isinf(epsilon) else _NOT_LESS))
    return figures


def _lines(extent: Extent, found: dict[Variant, list[_Result]]) -> list[Line]:
    lines = []
    for devices, factors in dict.fromkeys((variant.devices, variant.factors) for variant in found):
        points = []
        for epsilon in extent.epsilons:
            results = found[Variant(devices, factors, epsilon)]
            guarantee = results[0].guarantee
            alone = math.inf if guarantee is None else guarantee.epsilon["aggregator"]
            accuracy = {expert: [r.accuracy[metric] for r in results] for metric, expert in EXPERTS.items()}
            points.append((epsilon, alone, accuracy))
        lines.append(Line(f"{devices} devices, {'one factor' if factors == 'B' else 'both factors'}", points))
    return lines


class _Fleet:
    """Devices of one seed, on one backbone."""

    def __init__(self, extent: Extent, backbone: Backbone, task: Task, folder: Path) -> None:
        self._extent, self._backbone, self._seed, self._folder = extent, backbone, task.seed, folder
        folder.mkdir(parents=True)
        files = [folder / f"{number}{task.suffix}" for number in range(max(extent.fleets))]
        task.write_data(files)
        self._classes = task.classes
        self._data = [read_dataset(file, backbone.pack) for file in files]
        self._caches = [self._cache(number, data) for number, data in enumerate(self._data)]

    def _cache(self, number: int, data: Dataset) -> PrefixCache:
        return PrefixCache(self._folder / f"cache-{number}", self._backbone, data, micro_batch=_MICRO_BATCH)

    def run(self, variant: Variant) -> _Result:
        """Run FedMS to its end."""
        with self._scratch() as scratch:
            return self._run(variant, self._job(variant), scratch)

    def alone(self, devices: int) -> float:
        """Accuracy, mean over the devices, where each learns from its own samples alone and nothing leaves it."""
        settings = {**self._job(Variant(devices, "AB", math.inf)).settings, "depth": _DEPTH}
        common = {name: value for name, value in settings.items() if name in ExpertSettings.__struct_fields__}
        with self._scratch() as scratch:
            heads = [FrozenHead(device) for device in self._devices(devices, scratch)]
            outcomes = [head.run(Round("train", 1, common, {}, Guard())) for head in heads]
        return fmean(float(outcome.metrics["test"]) for outcome in outcomes)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch)

    def _job(self, variant: Variant) -> Job:
        parser = argparse.ArgumentParser()
        add_job_options(parser)
        first, second = map(str, self._extent.rounds)
        words = ["--seed", str(self._seed), "--max-depth", str(_DEPTH), "--sal-start", str(_DEPTH)]
        words += ["--global-rounds", first, "--personal-rounds", second, "--learning-rate", str(_RATE)]
        privacy = None
        if not math.isinf(variant.epsilon):
            noise = noise_for(variant.epsilon, DELTA, sum(self._extent.rounds), variant.devices)
            privacy = JobPrivacy(noise, CLIP, GATE_CLIP, DELTA, accuracy=True)
        args, manifest = parser.parse_args(words), self._backbone.pack.manifest
        (job,) = build_jobs(args, manifest, classes=self._classes, privacy=privacy)
        (open_,) = build_jobs(args, manifest, classes=self._classes)  # in which A may travel too
        return replace(job, settings={**job.settings, "factors": variant.factors}, shapes=open_.shapes)

    def _devices(self, count: int, scratch: Path) -> Iterator[Device]:
        for number, (data, cache) in enumerate(zip(self._data[:count], self._caches, strict=False)):
            name = f"device-{number}"
            yield Device(
                id=name,
                backbone=self._backbone,
                dataset=data,
                cache=cache,
                plan=_PLAN,
                costs=_COSTS,
                store=JobStore(scratch / name, "bench", "fedms"),
                progress=_quiet,
            )

    def _run(self, variant: Variant, job: Job, scratch: Path) -> _Result:
        strategy, codec = STRATEGIES["fedms"](job), Codec.named(job.codec)
        methods = {device.id: FedMS(device) for device in self._devices(variant.devices, scratch)}
        globals_, closed, told = Globals(job.codec), list[ClosedRound](), Tensors()
        account = None if job.privacy is None else Account(job.privacy)
        lost, typical = dict.fromkeys(methods, Tensors()), dict[str, Typical]()
        while (plan := strategy.next(closed)) is not None:
            _, changes = globals_.tell(plan.broadcast)
            if changes is not None:
                told = add_differences(told, codec.decode(globals_.payloads[changes.sha256], job.shapes))
            announced = Announcement(
                fleet="bench",
                run="bench",
                job=job.id,
                version=len(closed),
                method="fedms",
                stage=plan.stage,
                round=sum(trains(past.stage) for past in closed) + trains(plan.stage),
                rounds=strategy.rounds,
                backbone=job.backbone,
                quantisation=job.quantisation,
                settings={**job.settings, "depth": plan.depth},
                issued=0.0,
                expires=0.0,
                changes=changes,
                privacy=None if job.privacy is None else job.privacy.of(plan.stage),
            )
            opened = HeldRound(announced, plan, job.rule, self._typical(job, announced, plan, typical))
            for device, method in methods.items():
                doing = Round(plan.stage, announced.round, announced.settings, dict(told), Guard())
                answer: Answer = method.run(doing)
                if announced.privacy is not None:
                    answer = make_private(answer, announced, announced.privacy, PrivacyLimits())
                lost[device] = _add(opened, device, answer, lost[device], codec, job)
            if account is not None and (privacy := opened.privacy) is not None:
                account.add(privacy)
            globals_.add(opened.gain())
            closed.append(ClosedRound(plan.stage, opened.means()))
            if opened.typical is not None:
                typical[plan.stage] = opened.typical
        means = closed[-1].means
        return _Result({metric: means[metric] for metric in EXPERTS}, None if account is None else account.guarantee())

    @staticmethod
    def _typical(job: Job, announced: Announcement, plan: NextRound, before: Mapping[str, Typical]) -> Typical | None:
        """What bounds the updates of a round, as the aggregator has it."""
        if announced.privacy is None:
            return before.get(plan.stage)
        shapes = (shape for name, shape in job.shapes.items() if name.startswith(plan.trained))
        return Bounds.of_noise(job.rule, announced.privacy, shapes).typical


def _add(opened: OpenRound, device: str, answer: Answer, lost: Tensors, codec: Codec, job: Job) -> Tensors:
    """Take a device's answer as it arrives; every device counts the same. Returns what its codec owes."""
    tensors = Tensors()
    if answer.tensors:
        data, lost = encode_with_feedback(dict(answer.tensors), lost, codec)
        tensors = codec.decode(data, job.shapes)
    announced = opened.announcement
    manifest = UpdateManifest(
        *("bench", device, f"bench-{announced.version}", "bench", announced.job, announced.version),
        issued=0.0,
        backbone=announced.backbone,
        samples=1,
        metrics=dict(answer.metrics),
    )
    opened.add(Accepted(manifest, 0.0, announced.version, norm=norm_of(tensors)), tensors)
    return lost


_PLAN = Plan(_DEPTH, _MICRO_BATCH, False, "f16", 0.0, 0.0, 0.0, 0.0, None)
_COSTS = Costs(
    *("bench", "", "", "", 1, "1 core"),
    (Trial(1, 1, 1, False, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),),  # nothing is limited here, so nothing is predicted
)


def _quiet(*_said: object) -> None:
    pass
