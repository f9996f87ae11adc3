"""A fleet under attack, in one process: the devices' training and the rules are the real ones, nothing travels.

Stage 1 of FedMS on Fashion-MNIST. Frozen blocks run once for each picture, before everything else; what they give lies
in files that all runs share.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import Dataset, read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.prefix import CHUNK, ComputedPrefix, Indices, Prefix, split
from fleetune.edge.engine.suffix import Part
from fleetune.edge.methods.base import Device, Round, Tensors, read_settings
from fleetune.edge.methods.fedms.method import FedMS, FedMSSettings
from fleetune.edge.methods.local import LocalRun
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import add_differences
from fleetune.edge.protocol.messages import Announcement, UpdateManifest
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial
from fleetune.server.job import Job, RuleSettings
from fleetune.server.journal import Accepted
from fleetune.server.rules.base import norm_of
from fleetune.server.strategies import STRATEGIES
from fleetune.server.strategies.base import ClosedRound, NextRound
from fleetune.tools.assets import fashion_mnist_clients, write_images
from fleetune.tools.assets.datasets import ImageRows
from fleetune.tools.bench.learning.attackers import ATTACKS, TARGET, Attack, Knowledge, with_trigger
from fleetune.tools.bench.learning.held import HeldRound
from fleetune.tools.commands.serve import add_job_options
from fleetune.tools.jobs import build_jobs

FloatArray = NDArray[np.float32]

CLASSES = 10
DEPTHS = (1, 2)
"""Active blocks of the devices, in turns: as in a fleet of different boards, some train less than others."""

_DEEPEST = max(DEPTHS)
_MICRO_BATCH = 16
_EXAM, _MARKED = "exam", "exam-marked"


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        devices: Devices of the fleet.
        train: Training samples of each.
        rounds: Rounds.
        test: Pictures that nobody trained on, of all classes alike, on which the global expert is examined.
    """

    devices: int
    train: int
    rounds: int
    test: int


@dataclass(frozen=True)
class World:
    """The samples of one seed.

    Attributes:
        seed: Of the samples, the initial values and the order.
        alpha: Concentration of the Dirichlet distribution that deals classes out: less is more skewed.
    """

    seed: int
    alpha: float

    def folder(self, root: Path) -> Path:
        """Where its samples are."""
        return root / f"{self.seed}-{self.alpha:g}"

    def malicious(self, devices: int, count: int) -> frozenset[int]:
        """Which of its devices attack, if so many do; whoever does among few does so among more."""
        order = np.random.default_rng([self.seed, devices]).permutation(devices)
        return frozenset(int(place) for place in order[:count])


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        world: Its samples.
        rule: How updates become one.
        attack: Name of the attack; empty for none.
        malicious: Devices that attack.
    """

    world: World
    rule: RuleSettings
    attack: str = ""
    malicious: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        accuracy: Of the global expert, at the end.
        fooled: Share of pictures of other classes that it takes for the target once they have the trigger.
        refused: Malicious updates that were refused as outliers.
        refused_honest: Honest ones that were.
        norms: Norms of the honest updates, relative to the median of their round.
    """

    accuracy: float
    fooled: float
    refused: int
    refused_honest: int
    norms: tuple[float, ...]


# --- samples ----------------------------------------------------------------------------------------------------


def write_world(
    root: Path, source: Path, world: World, scale: Scale, *, malicious: int, attacks: Sequence[Attack]
) -> list[Path]:
    """Write the samples of every device, what attackers make of theirs, and the exam.

    Args:
        root: Folder of all worlds.
        source: What ``fetch("fashion-mnist")`` returned.
        world: Whose samples.
        scale: How many.
        malicious: Devices that attack, at most.
        attacks: What they may do.

    Returns:
        The files whose pictures differ, for :func:`write_prefix`.
    """
    folder = world.folder(root)
    folder.mkdir(parents=True)
    clients = fashion_mnist_clients(
        source, clients=scale.devices, train=scale.train, val=1, test=1, alpha=world.alpha, seed=world.seed
    )
    (exam,) = fashion_mnist_clients(
        source, clients=1, train=1, val=1, test=scale.test, alpha=1e6, seed=1000 + world.seed
    )
    files = {_name(place): rows for place, rows in enumerate(clients)}
    files |= {_EXAM: exam, _MARKED: exam._replace(images=with_trigger(exam.images))}
    for attack in attacks:
        if attack.poison is not None:
            for place in world.malicious(scale.devices, malicious):
                files[_name(place, attack)] = attack.poison(clients[place], CLASSES)
    for name, rows in files.items():
        write_images(folder / f"{name}.safetensors", rows.images, rows.labels, rows.splits)
    return [folder / f"{name}.safetensors" for name in files if not _same_pictures(files, name)]


def _name(place: int, attack: Attack | None = None) -> str:
    poisoned = f"-{attack.name.replace(' ', '-')}" if attack is not None and attack.poison is not None else ""
    return f"device-{place}{poisoned}"


def _plain(name: str) -> str:
    """The device whose samples a poisoned file was made of."""
    return "-".join(name.split("-")[:2])


def _same_pictures(files: dict[str, ImageRows], name: str) -> bool:
    """Whether a poisoned file has the pictures of its device."""
    plain = _plain(name)
    return name.startswith("device-") and plain != name and np.array_equal(files[plain].images, files[name].images)


def write_prefix(pack: Path, file: Path) -> None:
    """Run the frozen blocks for every picture of a file; hidden states [n, t, d] go beside it."""
    backbone = _backbone(pack, _DEEPEST)
    dataset = read_dataset(file, backbone.pack)
    boundary = backbone.blocks - _DEEPEST
    prefix = ComputedPrefix(backbone, dataset, _initial(backbone.pack, 0), boundary, micro_batch=_MICRO_BATCH)
    hidden = np.empty((len(dataset), int(dataset.lengths[0]), backbone.pack.manifest.width), dtype=np.float32)
    for some, (states, _), _ in prefix.sweep():
        hidden[some] = states
    np.save(file.with_suffix(".npy"), hidden, allow_pickle=False)


class _HeldPrefix(Prefix):
    """Hidden states of pictures, in memory."""

    def __init__(self, boundary: int, lengths: NDArray[np.int64], hidden: FloatArray) -> None:
        super().__init__(boundary, lengths)
        self._hidden = hidden

    @property
    def pooled(self) -> FloatArray:
        means: FloatArray = self._hidden.mean(axis=1)
        return means

    def parts(self, groups: Sequence[Indices]) -> Iterator[Part]:
        for some in groups:
            yield self._hidden[some], np.ones((len(some), 1, self._hidden.shape[1]), dtype=np.float32)

    def chunk(self, groups: Sequence[Indices]) -> list[Part]:
        return list(self.parts(groups))


class _HeldCache(PrefixCache):
    """Computed once for all runs, and held in memory; what is trained below a shallow device's blocks runs anew."""

    def __init__(self, backbone: Backbone, dataset: Dataset, hidden: FloatArray) -> None:
        super().__init__(Path(), backbone, dataset, micro_batch=_MICRO_BATCH, codec="none")
        self._of, self._samples, self._hidden = backbone, dataset, hidden

    def prefix(self, boundary: int, expert: Expert) -> Prefix:
        """The hidden states at ``boundary`` under the adapters of ``expert`` below it."""
        hidden = self._hidden
        for block in range(self._of.blocks - _DEEPEST, boundary):
            mask = np.ones((CHUNK, 1, hidden.shape[1]), dtype=np.float32)
            chunks = (hidden[some] for some in split(np.arange(len(hidden)), CHUNK))
            adapters = expert.adapters(block)
            hidden = np.concatenate([self._of.forward(block, part, mask[: len(part)], adapters) for part in chunks])
        return _HeldPrefix(boundary, self._samples.lengths, hidden)


class _NoStore:
    """Nobody runs out of memory here, and stage 1 keeps nothing."""

    folder, run, job = Path(), "bench", "fedms"

    def save(self, name: str, tensors: object) -> None:
        raise AssertionError(name, tensors)

    def load(self, name: str) -> None:
        del name


# --- a run ------------------------------------------------------------------------------------------------------


@functools.cache
def _backbone(pack: Path, depth: int) -> Backbone:
    """One for each depth, so that its training graph stays open."""
    del depth
    return Backbone(Pack.open(pack), threads=1)


def _initial(pack: Pack, seed: int) -> Expert:
    return Expert.initial(Layout.of(pack.manifest, CLASSES), seed)


@functools.lru_cache(maxsize=32)
def _device(pack: Path, file: Path, hidden: Path, depth: int) -> Device:
    backbone = _backbone(pack, depth)
    dataset = read_dataset(file, backbone.pack)
    cache = _HeldCache(backbone, dataset, np.load(hidden, allow_pickle=False))
    plan = Plan(depth, _MICRO_BATCH, False, "none", 0.0, 0.0, 0.0, 0.0, None)
    # Nothing is limited, so nothing asks what training costs.
    nothing = Trial(depth, 1, 1, False, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    costs = Costs(backbone.pack.sha256, version("fleetune"), "", "", 1, "unknown", (nothing,))
    return Device(_plain(file.stem), backbone, dataset, cache, plan, costs, _NoStore(), lambda *_said: None)


def run_case(root: Path, pack: Path, scale: Scale, case: Case) -> Outcome:
    """Lead a fleet through its rounds, and examine what it learned."""
    return _Fleet(root, pack, scale, case).run()


class _Fleet:
    def __init__(self, root: Path, pack: Path, scale: Scale, case: Case) -> None:
        self._pack, self._scale, self._case = pack, scale, case
        self._folder = case.world.folder(root)
        self._attack = next((attack for attack in ATTACKS if attack.name == case.attack), None)
        self._job = replace(_job(case.world.seed, scale.rounds, Pack.open(pack)), rule=case.rule)
        self._rng = np.random.default_rng([case.world.seed, case.malicious])
        self._refused = {True: 0, False: 0}
        self._norms: list[float] = []

    def run(self) -> Outcome:
        strategy = STRATEGIES["fedms"](self._job)
        closed, tensors, typical = [ClosedRound("prepare", {})], Tensors(), None
        while (plan := strategy.next(closed)) is not None and plan.stage == "global":
            opened = HeldRound(self._announcement(plan, len(closed)), plan, self._job.rule, typical)
            self._answer(opened, tensors, len(closed))
            tensors = add_differences(tensors, opened.gain())
            typical = opened.typical or typical
            closed.append(ClosedRound(plan.stage, opened.means()))
        exam, marked = self._examine(_EXAM, tensors), self._examine(_MARKED, tensors)
        labels = self._dataset(_EXAM).labels[self._dataset(_EXAM).indices("test")]
        return Outcome(
            accuracy=float((exam == labels).mean()),
            fooled=float((marked[labels != TARGET] == TARGET).mean()),
            refused=self._refused[True],
            refused_honest=self._refused[False],
            norms=tuple(self._norms),
        )

    def _announcement(self, plan: NextRound, number: int) -> Announcement:
        return Announcement(
            fleet="bench",
            run="bench",
            job=self._job.id,
            version=number,
            method="fedms",
            stage=plan.stage,
            round=number,
            rounds=self._scale.rounds,
            backbone=self._job.backbone,
            quantisation=self._job.quantisation,
            settings={**self._job.settings, "depth": plan.depth},
            issued=0.0,
            expires=0.0,
        )

    def _answer(self, opened: HeldRound, tensors: Tensors, number: int) -> None:
        """Have every device do the round; those who attack come last, and know what the others send."""
        honest = list[Tensors]()
        malicious = self._case.world.malicious(self._scale.devices, self._case.malicious)
        for place in sorted(range(self._scale.devices), key=lambda place: place in malicious):
            attack = self._attack if place in malicious else None
            own = self._train(place, attack, opened.announcement, tensors, number)
            sent = own
            if attack is None:
                honest.append(own)
            else:
                known = Knowledge(own, honest, self._scale.devices, self._case.malicious)
                sent = attack.craft(known, self._rng)
            self._take(opened, place, sent, attack)
        norms = [norm_of(some) for some in honest]
        self._norms += [norm / float(np.median(norms)) for norm in norms]

    def _train(
        self, place: int, attack: Attack | None, announced: Announcement, tensors: Tensors, number: int
    ) -> Tensors:
        device = self._member(_name(place, attack), DEPTHS[place % len(DEPTHS)])
        round_ = Round(announced.stage, number, announced.settings, tensors, Guard())
        if number > 1:
            return FedMS(device).run(round_).tensors
        key = (self._case.world, device.id, _name(place, attack))  # the first round is the same in all runs
        if key not in _FIRST:
            _FIRST[key] = FedMS(device).run(round_).tensors
        return _FIRST[key]

    def _take(self, opened: HeldRound, place: int, tensors: Tensors, attack: Attack | None) -> None:
        """As the aggregator's intake does."""
        norm = norm_of(tensors)
        if norm > opened.limit:
            self._refused[attack is not None] += 1
            return
        announced = opened.announcement
        manifest = UpdateManifest(
            fleet="bench",
            device=_name(place),
            update=f"bench-{announced.version}",
            run="bench",
            job=announced.job,
            version=announced.version,
            issued=0.0,
            backbone=announced.backbone,
            samples=self._scale.train * (1 if attack is None else attack.claims),
            metrics={},
        )
        opened.add(Accepted(manifest, 0.0, announced.version, norm=norm), tensors)

    def _member(self, name: str, depth: int) -> Device:
        file = self._folder / f"{name}.safetensors"
        own = file.with_suffix(".npy")
        return _device(self._pack, file, own if own.exists() else self._folder / f"{_plain(name)}.npy", depth)

    def _dataset(self, name: str) -> Dataset:
        return self._member(name, _DEEPEST).dataset

    def _examine(self, name: str, tensors: Tensors) -> NDArray[np.int64]:
        """Class that the global expert finds for each test picture."""
        device = self._member(name, _DEEPEST)
        expert = _initial(device.backbone.pack, self._case.world.seed)
        expert.add(tensors)
        settings = {**self._job.settings, "depth": _DEEPEST}
        run = LocalRun(device, read_settings(Round("global", 1, settings, {}, Guard()), FedMSSettings), expert)
        found: NDArray[np.int64] = expert.logits(run.features(expert, device.dataset.indices("test"))).argmax(axis=1)
        return found


_FIRST: dict[tuple[World, str, str], Tensors] = {}


def _job(seed: int, rounds: int, pack: Pack) -> Job:
    parser = argparse.ArgumentParser()
    add_job_options(parser, max_depth=_DEEPEST)
    words = ["--seed", str(seed), "--global-rounds", str(rounds), "--sal-start", str(_DEEPEST)]
    words += ["--batch", "8"]  # more steps, as the devices have few samples
    (job,) = build_jobs(parser.parse_args(words), pack.manifest, classes=CLASSES)
    return job
