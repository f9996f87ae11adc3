"""Plays every method on every split and seed, one after the other, and keeps each as soon as it is done."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, RunFolderError
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.tools.experiment.base import Algorithm, Federation, Hyper
from fleetune.tools.experiment.baselines import BASELINES
from fleetune.tools.experiment.data import deal, read_pictures
from fleetune.tools.experiment.pfedmoe import PFedMoE, Weighing
from fleetune.tools.pack.extractors import CNNS, Cnn

Make = Callable[[Federation, Sequence[Cnn], Hyper], Algorithm]

ABLATIONS: dict[str, Make] = {
    "pfedmoe-fixed": partial(PFedMoE, own=Weighing(gate="fixed")),
    "pfedmoe-element": partial(PFedMoE, own=Weighing(gate="element")),
    "pfedmoe-held-out": partial(PFedMoE, own=Weighing(held_out=0.2)),
}
"""pFedMoE with another gate, or one that learns from samples of its own: to see what the gate is worth."""

METHODS: dict[str, Make] = {"pfedmoe": PFedMoE, **BASELINES, **ABLATIONS}
"""Name → method; the first is what the others are held against."""

EQUAL = ("fedavg", "fedper", "ditto")
"""Methods that need the same model on all clients."""

_MAX_RECORD = 4 << 20


class Setting(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is run, but for method, split and seed.

    Attributes:
        data: A data set's name, or a folder.
        clients: How many; None for as many as a natural split has.
        fraction: Share of them that plays in a round.
        rounds: Rounds.
        model: The private model of all clients, or ``mixed``: CNN-1 to CNN-5 in turn.
        limit: Samples that a client has at most; None for all.
        alpha: Concentration of the Dirichlet split.
        epochs: Passes over a client's samples in a round.
        batch: Samples a step.
        learning_rate: Step size of plain SGD.
        shared_learning_rate: That of pFedMoE's shared extractor; None for the same.
        gate_learning_rate: That of its gate; None for the same.
    """

    data: str
    clients: int | None
    fraction: float
    rounds: int
    model: str
    limit: int | None
    alpha: float
    epochs: int
    batch: int
    learning_rate: float
    shared_learning_rate: float | None = None
    gate_learning_rate: float | None = None


class Case(msgspec.Struct, frozen=True):
    """One run of one method.

    Attributes:
        split: How samples are dealt out.
        seed: Of that, of initial values, and of who plays when.
        method: Its name.
    """

    split: str
    seed: int
    method: str


class Record(msgspec.Struct, frozen=True):
    """What came of a case; each list has an entry a round.

    Attributes:
        case: Which.
        accuracy: Mean over the clients, of their own test samples.
        sent: Numbers that went up and down so far.
        flops: Floating-point operations of training so far.
        seconds: Seconds of training so far.
    """

    case: Case
    accuracy: list[float]
    sent: list[int]
    flops: list[float]
    seconds: list[float]

    @property
    def best(self) -> float:
        """Of its rounds."""
        return max(self.accuracy)

    def reaches(self, target: float) -> int | None:
        """The round, counted from 1, after which it is at the target; None if it never is."""
        return next((number for number, found in enumerate(self.accuracy, start=1) if found >= target), None)


def cases(splits: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> list[Case]:
    """All of them, those of the same samples together."""
    return [Case(split, seed, method) for split in splits for seed in seeds for method in methods]


def check(setting: Setting, methods: Sequence[str]) -> None:
    """See that every method can be run so.

    Raises:
        ConfigError: A method is unknown, or needs equal models.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"--methods: {method} is unknown", f"choose from {', '.join(METHODS)}")
        if method in EQUAL and setting.model == "mixed":
            raise ConfigError(
                f"--methods: {method} averages whole models, and --model mixed gives clients different ones",
                f"leave out {', '.join(EQUAL)}, or use --model with one of {', '.join(CNNS)}",
            )


def play_all(
    setting: Setting, wanted: Sequence[Case], folder: Path, say: Callable[[str], None], *, threads: int = 0
) -> list[Record]:
    """Play what is not in the folder yet.

    Args:
        setting: What is run.
        wanted: The cases.
        folder: Keeps a file for each case; what lies there of the same setting is not played again.
        say: Is told what happens next.
        threads: Threads that compute a step; 0 for one a core.

    Raises:
        ConfigError: The samples do not suffice.
        RunFolderError: A file in the folder is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, dealt, found = None, dict[tuple[str, int], Federation](), list[Record]()
    for number, case in enumerate(wanted, start=1):
        file = folder / f"{_key(setting, case)}.json"
        if not file.exists():
            if (case.split, case.seed) not in dealt:
                pictures = pictures or read_pictures(setting.data)
                dealt = {
                    (case.split, case.seed): deal(
                        pictures,
                        case.split,
                        clients=None if case.split == "natural" else setting.clients,
                        seed=case.seed,
                        batch=setting.batch,
                        alpha=setting.alpha,
                        limit=setting.limit,
                    )
                }
            what = f"{number} of {len(wanted)}: {case.split}, seed {case.seed}, {case.method}"
            record = _play(setting, case, dealt[case.split, case.seed], threads, what, say)
            write_atomic(file, msgspec.json.encode(record))
        found.append(_read(file))
    return found


def models(setting: Setting, clients: int) -> list[Cnn]:
    """The private model of each client."""
    if setting.model == "mixed":
        return list(itertools.islice(itertools.cycle(CNNS.values()), clients))
    return [CNNS[setting.model]] * clients


def _play(
    setting: Setting, case: Case, federation: Federation, threads: int, what: str, say: Callable[[str], None]
) -> Record:
    clients = len(federation.clients)
    rates = setting.shared_learning_rate, setting.gate_learning_rate
    hyper = Hyper(setting.epochs, setting.batch, setting.learning_rate, case.seed, *rates, threads)
    method = METHODS[case.method](federation, models(setting, clients), hyper)
    record = Record(case, [], [], [], [])
    sent, flops, seconds = 0, 0.0, 0.0
    for number in range(setting.rounds):
        rng = np.random.default_rng([case.seed, number])  # the same clients for every method
        count = max(1, round(setting.fraction * clients))
        start = time.perf_counter()
        cost = method.play(sorted(int(one) for one in rng.choice(clients, count, replace=False)))
        seconds += time.perf_counter() - start
        sent, flops = sent + cost.sent, flops + cost.flops
        accuracy = float(np.mean(method.accuracies()))
        record.accuracy.append(accuracy)
        record.sent.append(sent)
        record.flops.append(flops)
        record.seconds.append(seconds)
        say(f"{what}, round {number + 1} of {setting.rounds}, accuracy {accuracy:.3f}")
    return record


def _key(setting: Setting, case: Case) -> str:
    digest = hashlib.sha256(msgspec.json.encode([setting, case])).hexdigest()[:12]
    return f"{case.split}-{case.seed}-{case.method}-{digest}"


def _read(file: Path) -> Record:
    try:
        return msgspec.json.decode(read_bytes(file, _MAX_RECORD), type=Record)
    except (OSError, *UNDECODABLE) as error:
        raise RunFolderError(f"{file} cannot be read: {error}", "delete it: it is played again") from error
