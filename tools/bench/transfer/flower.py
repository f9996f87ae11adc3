"""Flower's rounds and its idle device, measured in processes of Flower's own environment.

A round here trains nothing: it sends tensors to every device, gets tensors of that size back, and averages them. Flower
can be run in two ways. As it is *deployed*, a SuperLink and a SuperNode for each device run for ever, and every message
starts a ClientApp in a process of its own. Its older interface of gRPC *streams* has one process a server and one a
device; it is deprecated since Flower 1.13, knows neither apps nor a restart, and is many times as fast.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import RunFailedError

FloatArray = NDArray[np.float32]

_APP = Path(__file__).with_name("flower_app")
_PORTS = range(20_000, 32_000)
"""Below those that Linux gives to outgoing connections, which could take one before its process listens."""
_START_S = 600.0
"""Two processes a device, each a second of a core."""
_POLL_S = 1.0
"""Pause before a ServerApp looks for replies again: of 0.05 to 3 s the one with the shortest rounds."""
_REST_S = 5.0
"""How long a device is left alone before its memory is read."""
_SPARE = 0.08
"""Share of the machine's memory that must stay free: 64 deployed devices and their ClientApps would take 24 GiB, and
what the kernel kills then may be anything."""


@dataclass(frozen=True)
class Idle:
    """Memory of a device that waits, all of its processes together.

    Attributes:
        rss_mib: Resident set; pages that processes share count for each.
        pss_mib: Pages that processes share count by their share.
        uss_mib: What would be free without it.
    """

    rss_mib: float
    pss_mib: float
    uss_mib: float


def lora_matrices(*, blocks: int = 12, width: int = 768, rank: int = 8) -> list[FloatArray]:
    """Matrices of LoRA on the queries and values of an encoder, A [rank, width] and B [width, rank]: 1.2 MB."""
    random = np.random.default_rng(0)
    shapes = [(rank, width), (width, rank)] * 2 * blocks
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


def flower_rounds(
    python: Path,
    folder: Path,
    *,
    devices: int,
    rounds: int,
    tensors: Sequence[FloatArray],
    streams: bool = False,
    limit_s: float = 180.0,
    say: Callable[[str], None],
) -> list[float]:
    """Seconds of each round, from one round's end to the next; a first one is run and dropped.

    Args:
        python: Flower's interpreter.
        folder: For Flower's state and a log of each process; empty.
        devices: How many; at least two, as Flower's FedAvg wants.
        rounds: How many are timed.
        tensors: What travels. No two may be the same: Flower would send one of them.
        streams: Use gRPC streams.
        limit_s: Time for all rounds, from the moment when all devices are up.
        say: Is told what happens next.

    Returns:
        `rounds` values, or fewer where the limit comes first, perhaps none.

    Raises:
        RunFailedError: A process ends or does not start, a device's answer is an error, or memory runs out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tensors.npz", *tensors)
    ends = folder / "ends.txt"
    ends.touch()
    spec = {"devices": devices, "rounds": rounds + 1, "tensors": str(folder / "tensors.npz"), "ends": str(ends)}
    with Processes(python, folder) as running:
        say(f"Flower: starts {devices} devices")
        if streams:
            _start_streams(running, spec, devices)
        else:
            _deploy(running, devices)
            _submit(running, spec)
        deadline = time.monotonic() + limit_s
        while len(found := read_ends(ends)) <= rounds and time.monotonic() < deadline:
            say(f"Flower: {devices} devices, round {len(found) + 1} of {rounds + 1}")
            running.check()
            time.sleep(0.2)
    return [later - earlier for earlier, later in itertools.pairwise(found)]


def flower_idle(python: Path, folder: Path, *, streams: bool = False) -> Idle:
    """What a device takes that waits for its first round.

    Args:
        python: Flower's interpreter.
        folder: For Flower's state and a log of each process; empty.
        streams: Use gRPC streams.

    Raises:
        RunFailedError: A process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tensors.npz", *lora_matrices(blocks=1))
    with Processes(python, folder) as running:
        if streams:
            spec = {"devices": 2, "rounds": 1, "tensors": str(folder / "tensors.npz"), "ends": str(folder / "ends.txt")}
            _start_streams(running, spec, 1)
        else:
            _deploy(running, 1)
        time.sleep(_REST_S)
        running.check()
        found = [process.memory_full_info() for process in running.family("device-0")]
    return Idle(*(sum(getattr(each, kind) for each in found) / 2**20 for kind in ("rss", "pss", "uss")))


def read_ends(file: Path) -> list[float]:
    """When the rounds ended, as far as the server has written it.

    Raises:
        RunFailedError: The server wrote that it failed.
    """
    found = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("error: "):
            raise RunFailedError(f"Flower's round failed: {line.removeprefix('error: ').strip()}", f"see {file.parent}")
        if line.endswith("\n"):  # or it is being written
            found.append(float(line))
    return found


def _deploy(running: Processes, devices: int) -> None:
    link, *nodes = _free_ports(devices + 1)
    running.configure(link)
    running.start(
        "superlink", "flower-superlink", "--insecure", "--port", str(link), "--disable-runtime-dependency-installation"
    )
    running.await_port("superlink", link)
    for index, port in enumerate(nodes):
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)]
        running.start(f"device-{index}", *command)
    for index in range(devices):
        running.await_text(f"device-{index}", "SuperNode ID: ")


def _submit(running: Processes, spec: dict[str, object]) -> None:
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in {**spec, "poll-s": _POLL_S}.items())
    running.start("run", "flwr", "run", str(_APP), "bench", "--run-config", config)
    running.await_text("run", "Successfully started run")


def _start_streams(running: Processes, spec: dict[str, object], devices: int) -> None:
    (port,) = _free_ports(1)
    address = f"127.0.0.1:{port}"
    running.start("server", "python", str(_APP / "streams_server.py"), json.dumps({**spec, "address": address}))
    running.await_port("server", port)
    for index in range(devices):
        running.start(f"device-{index}", "python", str(_APP / "streams_client.py"), address, str(index))


def _free_ports(count: int) -> list[int]:
    found = []
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RunFailedError(f"fewer than {count} ports from {_PORTS[0]} to {_PORTS[-1]} are free", "stop what holds them")


class Processes:
    """Flower's processes, each with a log of its own; none outlives the block.

    Args:
        python: Flower's interpreter; its programs lie beside it.
        folder: For Flower's home and the logs.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self._programs, self._folder, self._home = python.parent, folder, folder / "home"
        self._home.mkdir(exist_ok=True)
        self._environment = {
            **os.environ,
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self._home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # a ClientApp starts anew for every message
            "no_proxy": "127.0.0.1",
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def configure(self, port: int) -> None:
        """Tell ``flwr run`` where the SuperLink is."""
        text = f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (self._home / "config.toml").write_text(text, encoding="utf-8")

    def start(self, name: str, program: str, *arguments: str) -> None:
        """Start one; it gets a session of its own, so that Ctrl-C reaches only this process."""
        with self._log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [str(self._programs / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
                cwd=self._folder,
            )

    def check(self) -> None:
        """Look after all of them.

        Raises:
            RunFailedError: One failed, and what it wrote last; or they take too much of the machine's memory.
        """
        for name, process in self._running.items():
            if code := process.poll():
                lines = self._read(name).strip().splitlines() or [""]
                raise RunFailedError(
                    f"Flower's {name} ended with exit code {code}: {lines[-1]}", f"see {self._log(name)}"
                )
        memory = psutil.virtual_memory()
        if memory.available < _SPARE * memory.total:
            raise RunFailedError(
                f"Flower's processes leave {memory.available / 2**20:.0f} MiB of the machine's memory free",
                "use fewer devices, or a machine with more memory",
            )

    def await_text(self, name: str, text: str) -> None:
        """Wait until a process has written something.

        Raises:
            RunFailedError: A process failed, or it does not come in time.
        """
        self._await(name, lambda: text in self._read(name))

    def await_port(self, name: str, port: int) -> None:
        """Wait until a process listens.

        Raises:
            RunFailedError: A process failed, or it does not come in time.
        """

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        self._await(name, listens)

    def family(self, name: str) -> list[psutil.Process]:
        """A process and all that it started."""
        process = psutil.Process(self._running[name].pid)
        return [process, *process.children(recursive=True)]

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise RunFailedError(f"Flower's {name} does not start in {_START_S:.0f} s", f"see {self._log(name)}")
            time.sleep(0.05)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.txt"

    def _read(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8", errors="replace")

    def _alive(self) -> Iterator[psutil.Process]:
        """All that run with this home: some have sessions of their own, and parents that have ended."""
        started = {process.pid for process in self._running.values() if process.poll() is None}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # One that has just been started has no environment yet.
                if process.pid in started or process.environ().get("FLWR_HOME") == str(self._home):
                    yield process

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        while alive := list(self._alive()):  # one may start another while it is looked for
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=1.0)
        for started in self._running.values():
            started.wait()
