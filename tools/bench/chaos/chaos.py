"""``fleetune bench chaos``: whether a fleet comes to its end, and to the right one, whatever goes wrong meanwhile."""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import FleetuneError
from fleetune.edge.protocol.files import FolderLock
from fleetune.tools.bench.chaos.check import Findings, check
from fleetune.tools.bench.chaos.fleet import Course, Fleet, unmount_below
from fleetune.tools.bench.chaos.plan import DEVICES, Kind, Plan, plan_of
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.network import Network

PEERS: dict[str, str] = {}

_FULL = range(300)
_QUICK = range(96, 108)
"""A dozen that meet every kind of fault, the deaths with a target among those that come alone."""

_NONE = Target(0.0, lower=True)
_TIMES: dict[Kind, tuple[str, Target | None]] = {
    "kill-device": ("from a device's death to the next round with its answer", Target(6.0, lower=True)),
    "lose-device": ("from a device's death to the next round without it", None),
    "kill-aggregator": ("from the aggregator's death to the next round's end", Target(10.0, lower=True)),
    "kill-broker": ("from the broker's death to the next round's end", None),
    "cut": ("from a cut of 3 s to the next round with the device's answer", None),
    "full-device": ("from a device's disk being full for 3 s to the next round with its answer", None),
    "full-aggregator": ("from the aggregator's disk being full for 3 s to the next round's end", None),
}
_SHOWN = 20


@dataclass(frozen=True)
class Result:
    """A run, and what was found after it."""

    plan: Plan
    course: Course
    findings: Findings

    @property
    def failed(self) -> bool:
        """Whether anything is not as it must be."""
        return not self.course.completed or bool(list(self.findings)) or bool(self.course.ended)

    def __str__(self) -> str:
        course = self.course
        end = f"{course.seconds:.1f} s" if course.completed else f"not at its end after {course.seconds:.0f} s"
        return "; ".join((str(self.plan), end, *course.ended, *self.findings))


def bench_chaos(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For state and logs; those of runs that failed stay.
        quick: A dozen runs, which meet every kind of fault.
        peers: None: nobody else is asked.
        threads: Not used: nobody trains.
        say: Told what happens next.

    Raises:
        ConfigError: This is not root, or a program is missing.
        RunFailedError: The kernel does not make networks or mounts.
    """
    del peers, threads
    seeds = _QUICK if quick else _FULL
    results = list[Result]()
    for result in run_seeds(seeds, folder):
        results.append(result)
        failed = sum(one.failed for one in results)
        say(f"{len(results)} of {len(seeds)} runs, {failed} failed; {'FAILED: ' if result.failed else ''}{result}")
    return summary(results, folder)


def run_seeds(seeds: Iterable[int], folder: Path, *, keep: bool = False) -> Iterable[Result]:
    """Run one after the other.

    Args:
        seeds: What to draw the runs from.
        folder: For state and logs; those of runs that failed stay.
        keep: Whether the others' stay, too.

    Raises:
        ConfigError: This is not root, or a program is missing.
        RunFailedError: The kernel does not make networks or mounts.
    """
    with closing(Network(tuple(DEVICES))) as network:
        unmount_below(folder)
        for seed in seeds:
            plan, place = plan_of(seed), folder / f"seed-{seed}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            with Fleet(plan, place, network) as fleet:
                result = Result(plan, fleet.run(), check(place, plan))
                if result.failed or keep:
                    kept = folder / f"{'failed' if result.failed else 'good'}-{seed}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(place, kept)
            shutil.rmtree(place)
            yield result


def summary(results: Sequence[Result], folder: Path) -> Document:
    """The figures of some runs."""
    runs = len(results)
    figures = [
        figure("runs", "", [runs]),
        figure(
            "runs that came to their end",
            "",
            [sum(result.course.completed for result in results)],
            target=Target(runs, lower=False),
        ),
        _count("acknowledged updates lost", [len(result.findings.lost) for result in results]),
        _count("updates counted twice", [len(result.findings.doubled) for result in results]),
        _count("rounds and copies that are wrong", [len(result.findings.wrong) for result in results]),
        _count("processes that ended by themselves", [len(result.course.ended) for result in results]),
    ]
    for kind, (name, target) in _TIMES.items():
        times = _times(results, kind)
        if times:
            figures.append(figure(f"{name} ({len(times)} runs)", "s", times, target=target))
    failed = [result for result in results if result.failed]
    notes = [f"failed: {result}" for result in failed[:_SHOWN]]
    if failed:
        seeds = " ".join(str(result.plan.seed) for result in failed)
        notes.append(f"to see them again: {sys.executable} -m {__spec__.name} {seeds}; logs and state are in {folder}")
    fired = sum(len(result.course.fired) for result in results)
    garbled = sum(result.course.garbled for result in results)
    notes.append(f"{fired} faults came in time; {garbled} messages were garbled")
    notes.append("times are of runs with one fault, in which a round waits for all who are there")
    return Document("chaos", tuple(figures), notes=tuple(notes))


def _count(name: str, counts: Sequence[int]) -> Figure:
    return figure(name, "", [sum(counts)], target=_NONE)


def _times(results: Sequence[Result], kind: Kind) -> list[float]:
    fired = (result.course.fired for result in results if _tells_times(result.plan))
    return [seconds for one in fired for fault, seconds in one if fault.kind == kind and math.isfinite(seconds)]


def _tells_times(plan: Plan) -> bool:
    """Whether one fault alone keeps a round from closing."""
    return len(plan.faults) == 1 and plan.buffer is None


def main() -> None:
    """Run some seeds, and keep what they leave where they failed."""
    parser = argparse.ArgumentParser(description="Run single seeds of `fleetune bench chaos`, as root.")
    parser.add_argument("seeds", nargs="+", metavar="SEED", help="a number, or a range such as 0-11")
    parser.add_argument("--folder", type=Path, default=Path("chaos"), help="for state and logs (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep what good runs leave, too")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without clearing up
    results = list[Result]()
    try:
        with closing(FolderLock(args.folder, remedy="name another one with --folder")):
            for result in run_seeds(_seeds(args.seeds), args.folder, keep=args.keep):
                results.append(result)
                print(f"{'FAILED' if result.failed else 'ok'}: {result}", flush=True)  # noqa: T201
    except FleetuneError as error:
        sys.exit(f"error: {error.what}\nremedy: {error.remedy}")
    document = summary(results, args.folder)
    for item in document.figures:
        range_ = f"  {item.spread[0]:.3g} to {item.spread[1]:.3g}" if item.unit else ""
        print(f"{item.name}: {item.value:.3g} {item.unit}{range_}  {item.target or ''}")  # noqa: T201
    print("\n".join(document.notes))  # noqa: T201
    sys.exit(any(result.failed for result in results))


def _seeds(words: Iterable[str]) -> list[int]:
    ends = (word.partition("-") for word in words)
    return [seed for first, _, last in ends for seed in range(int(first), int(last or first) + 1)]


if __name__ == "__main__":
    main()
