"""``fleetune bench fleet``: what a large fleet asks of one aggregator and one broker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.server.journal import FILE, Announced, Closed, read_records
from fleetune.tools.bench.figures import Document, Figure, Target, figure
from fleetune.tools.bench.transfer.broker import mosquitto
from fleetune.tools.bench.transfer.noop import NoOpSpec, Shapes, lora_shapes

PEERS: dict[str, str] = {}

_A_PROCESS = 64
"""Agents of one process: paho waits with select(2), which knows no file beyond the 1,024th."""

_ROUND = Target(1.0, lower=True)
_MEMORY = Target(150.0, lower=True)
_GROWTH = Target(1.05, lower=True)
_PATIENCE_S = 900.0

SMALL: Shapes = lora_shapes(1, 64, 8, ("q",))
"""4 KiB: what is measured is everything but the bytes."""

MEDIUM: Shapes = lora_shapes(1, 160, 8, ("q",))
"""10 KiB: an update in int4."""


def bench_fleet(
    folder: Path, *, quick: bool, peers: Sequence[str], threads: int, say: Callable[[str], None]
) -> Document:
    """Run the benchmark.

    Args:
        folder: For configurations, state and logs.
        quick: A tenth of the devices.
        peers: None: nobody else is measured.
        threads: Not used: nobody trains.
        say: Is told what happens next.
    """
    del peers, threads
    live, injected, rounds = (50, 500, 6) if quick else (500, 5000, 12)
    folder.mkdir(parents=True, exist_ok=True)
    growth = None if quick else _GROWTH  # of few rounds it is the start that shows
    figures = [
        *_live(folder / "live", live, rounds, say),
        *_injected(folder / "injected", injected, rounds, say, growth=growth),
    ]
    return Document("fleet", tuple(figures))


def _live(folder: Path, count: int, rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """Agents that connect, keep state and answer; of everything that an agent does, only training is missing."""
    folder.mkdir()
    devices = tuple(f"device-{number}" for number in range(count))
    # Five hundred devices have five hundred disks: what they sync must not wait for the one that is here.
    memory_disk = Path("/dev/shm") if Path("/dev/shm").is_dir() else folder  # noqa: S108
    with mosquitto(folder) as (broker, process), tempfile.TemporaryDirectory(dir=memory_disk) as disks:
        agents = [devices[start : start + _A_PROCESS] for start in range(0, count, _A_PROCESS)]
        specs = [spec_for(broker, Path(disks), some, SMALL, rounds) for some in agents]
        say(f"starts {count} agents")
        with killed(start("noop_agent", folder / f"agents-{n}", spec) for n, spec in enumerate(specs)):
            say(f"{count} agents, {rounds} rounds")
            times, memory = lead(folder / "aggregator", spec_for(broker, folder / "aggregator", devices, SMALL, rounds))
            connections = len(process.net_connections("tcp"))
    if connections < count:
        raise RunFailedError(f"{connections} connections for {count} agents", f"see the logs in {folder}")
    name = f"{count} live agents, 4 KiB each way"
    return [
        figure(f"{name}: a round", "s", times, target=_ROUND),
        figure(f"{name}: the aggregator's memory, most", "MiB", [max(memory)], target=_MEMORY),
    ]


def _injected(
    folder: Path, count: int, rounds: int, say: Callable[[str], None], *, growth: Target | None
) -> list[Figure]:
    """Updates of many more devices, from one connection; then the same messages to somebody who only counts them."""
    folder.mkdir()
    devices = tuple(f"device-{number}" for number in range(count))
    times, memory, alone, peaks = list[float](), list[float](), list[float](), list[float]()
    for turn in range(3):
        with mosquitto(folder) as (broker, _):
            spec = spec_for(broker, folder / f"aggregator-{turn}", devices, MEDIUM, rounds)
            say(f"{count} devices' updates, {rounds} rounds, turn {turn + 1} of 3")
            with killed([start("injector", folder / f"injector-{turn}", spec, "inject")]):
                some, held = lead(folder / f"aggregator-{turn}", spec)
            times.append(median(some))
            quarter = len(held) // 4
            memory.append(max(held[-quarter:]) / max(held[quarter : 2 * quarter]))
            peaks.append(max(held))
        with mosquitto(folder, endless=True) as (broker, _):  # nobody sends again what it drops
            say(f"the same messages through the broker alone, turn {turn + 1} of 3")
            alone.append(_broker_alone(folder, spec_for(broker, folder, devices, MEDIUM, 4)) / 4)
    shares = [least / seconds for least, seconds in zip(alone, times, strict=True)]
    name = f"{count} injected updates a round, 10 KiB each"
    return [
        figure(f"{name}: updates a second", "", [count / seconds for seconds in times]),
        figure(
            f"{name}: throughput, of what the broker alone moves",
            "",
            shares,
        ),
        figure(f"{name}: the aggregator's memory at the end, of that after a quarter", "", memory, target=growth),
        figure(f"{name}: the aggregator's memory, most", "MiB", peaks, target=_MEMORY),
    ]


def _broker_alone(folder: Path, spec: NoOpSpec) -> float:
    """Seconds from the first message to the last."""
    counter = start("injector", folder / "counter", spec, "count", output=subprocess.PIPE)
    assert counter.stdout is not None
    with killed([counter]):
        counter.stdout.readline()
        with killed([start("injector", folder / "replay", spec, "replay")]):
            return float(counter.stdout.readline() or "nan")


def spec_for(broker: BrokerAddress, folder: Path, devices: tuple[str, ...], shapes: Shapes, rounds: int) -> NoOpSpec:
    """What a process is to do; ``folder`` is for its state."""
    return NoOpSpec(broker.host, broker.port, str(folder), devices, shapes, rounds)


def start(module: str, stem: Path, spec: NoOpSpec, *more: str, output: int | None = None) -> subprocess.Popen[bytes]:
    """Start one of the benchmark's processes; its log is beside what it is told to do."""
    file = stem.with_suffix(".json")
    file.write_bytes(msgspec.json.encode(spec))
    with stem.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"fleetune.tools.bench.transfer.{module}", str(file), *more],
            stdout=log if output is None else output,
            stderr=log,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # as `fleetune agent` has it
        )


@contextmanager
def killed(processes: Iterable[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Processes that end with the block, however that ends."""
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def lead(stem: Path, spec: NoOpSpec) -> tuple[list[float], list[float]]:
    """Run the aggregator to its end.

    Returns:
        Seconds of each round but the first, and the aggregator's memory in MiB, four times a second.

    Raises:
        RunFailedError: It fails, or takes too long.
    """
    aggregator = start("noop_server", stem, spec)
    held, ended = list[float](), threading.Event()
    watcher = threading.Thread(target=_watch, args=[aggregator.pid, held, ended])
    watcher.start()
    try:
        code: Any = aggregator.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = f"none after {_PATIENCE_S:.0f} s"
    finally:
        ended.set()
        watcher.join()
        aggregator.kill()
        aggregator.wait()
    if code:
        raise RunFailedError(f"the aggregator ended with exit code {code}", f"see {stem.with_suffix('.log')}")
    return round_seconds(Path(spec.folder)), held


def round_seconds(state: Path) -> list[float]:
    """Seconds between the ends of rounds of training that follow each other, from an aggregator's journal."""
    stages, ends = dict[int, str](), list[float]()
    for record in read_records(state / FILE):
        if isinstance(record, Announced):
            stages[record.announcement.version] = record.announcement.stage
        elif isinstance(record, Closed) and stages[record.version] == "global":
            ends.append(record.closed)
    return [later - earlier for earlier, later in pairwise(ends)]


def _watch(pid: int, held: list[float], ended: threading.Event) -> None:
    process = psutil.Process(pid)
    while not ended.wait(0.25):
        try:
            rss = process.memory_info().rss
        except psutil.NoSuchProcess:
            return
        if rss:  # of a process that ends there is none left
            held.append(rss / 2**20)
