"""One run of the chaos benchmark: a small fleet of processes, its broker, and what goes wrong."""

from __future__ import annotations

import errno
import heapq
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.server.journal import FILE, Accepted, Announced, Closed, Record
from fleetune.tools.bench.chaos.plan import DEVICES, Fault, Plan
from fleetune.tools.bench.chaos.process import ChaosSpec
from fleetune.tools.bench.chaos.proxy import Proxy
from fleetune.tools.network import Network
from fleetune.tools.programs import find_program

LIMIT_S = 90.0
"""Seconds that a run may take."""

_RESTART_S = 0.5
_BROKER_RESTART_S = 1.0
_CUT_S = _FULL_S = 3.0
_SLOW_KBIT = 256
_TICK_S = 0.01
_DISK_MIB = 32
_PORT = 1883
_SOURCE = "chaos"
"""What the kernel's table of mounts calls our disks."""

_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
user root
set_tcp_nodelay true
max_packet_size 131072
max_inflight_messages 20
max_queued_messages 4096
memory_limit 2147483648
persistence false
log_dest stderr
connection_messages false
"""


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        completed: Whether the aggregator came to its end in time.
        seconds: How long it took.
        fired: Faults that came before it was over, and the seconds from each until the next round was closed — with
            the victim's answer, if that is a device that comes back; infinite if there was none.
        ended: Processes that ended by themselves, with their last words.
        garbled: Messages that were garbled.
    """

    completed: bool
    seconds: float
    fired: tuple[tuple[Fault, float], ...]
    ended: tuple[str, ...]
    garbled: int


@dataclass
class _Disk:
    """A small file system of its own for what a process keeps."""

    folder: Path
    full: bool = False

    def mount(self) -> None:
        self.folder.mkdir(parents=True)
        options = f"size={_DISK_MIB}m,mode=700"
        _system(find_program("mount", "mount"), "-t", "tmpfs", "-o", options, _SOURCE, str(self.folder))

    def unmount(self) -> None:
        _system(find_program("umount", "mount"), "--lazy", str(self.folder))

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    def fill(self) -> None:
        """Leave no room, also none that somebody has just made."""
        self.full = True
        room = os.statvfs(self.folder)
        if room.f_bavail:
            with self._filler.open("ab") as file:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room.f_bavail * room.f_frsize)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def empty(self) -> None:
        self.full = False
        self._filler.unlink(missing_ok=True)


@dataclass
class _Process:
    """A process that is started again when it ends, as systemd would.

    Attributes:
        command: How to start it.
        log: What it writes.
        restart_s: Seconds until it is started again; None for never.
        disk: What it keeps its state on.
    """

    command: Sequence[str]
    log: Path
    restart_s: float | None
    disk: _Disk | None = None
    found_no_room: bool = False
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.found_no_room = self.disk is not None and self.disk.full
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for who leads the run
            )

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, closed or said goodbye to."""
        if self.running is not None:
            self.running.kill()
            self.running.wait()
            self.running = None

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


@dataclass
class _Watch:
    """What the journal says, and since when, by the monotonic clock."""

    path: Path
    announced: dict[int, float] = field(default_factory=dict)
    accepted: list[tuple[str, int, float]] = field(default_factory=list)
    closed: dict[int, tuple[Closed, float]] = field(default_factory=dict)
    _lines: int = 0

    def look(self) -> None:
        if not self.path.exists():
            return
        data, now = self.path.read_bytes(), time.monotonic()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        for line in lines[self._lines :]:
            record = msgspec.json.decode(line, type=Record)
            if isinstance(record, Announced):
                self.announced.setdefault(record.announcement.version, now)
            elif isinstance(record, Accepted):
                self.accepted.append((record.manifest.device, record.into, now))
            elif isinstance(record, Closed):
                self.closed.setdefault(record.version, (record, now))
        self._lines = len(lines)

    def next_closed(self, since: float, device: str = "") -> float:
        """Seconds until the next round was closed, if need be with an answer that a device gave later than that."""
        answered = {into for name, into, at in self.accepted if name == device and at > since}
        times = (at for version, (_, at) in self.closed.items() if at > since and (not device or version in answered))
        return min(times, default=math.inf) - since


class Fleet:
    """A run, from its first process to its last; what it keeps on disk is there until the `with` block ends.

    Args:
        plan: What happens.
        folder: For state and logs; empty.
        network: Whose wires the devices hang on.
    """

    def __init__(self, plan: Plan, folder: Path, network: Network) -> None:
        self._plan, self._folder, self._network = plan, folder, network
        self._stack = ExitStack()
        self._broker = BrokerAddress(network.address, _PORT)
        self._disks = {name: _Disk(folder / name) for name in ("aggregator", *DEVICES)}
        self._processes: dict[str, _Process] = {}
        self._proxies: dict[str, Proxy] = {}
        self._watch = _Watch(folder / "aggregator" / FILE)
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting = list(plan.faults)
        self._fired: list[tuple[Fault, float]] = []
        self._ended: list[str] = []

    def __enter__(self) -> Fleet:
        self._network.reset()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def run(self) -> Course:
        """Run it; all processes have ended when this returns."""
        start = time.monotonic()
        for disk in self._disks.values():
            disk.mount()
            self._stack.callback(disk.unmount)
        self._prepare()
        completed = self._follow(start + LIMIT_S)
        seconds = time.monotonic() - start
        for process in self._processes.values():
            process.kill()
        for disk in self._disks.values():
            disk.empty()
        return Course(
            completed,
            seconds,
            tuple((fault, self._recovery_s(fault, at)) for fault, at in self._fired),
            tuple(self._ended),
            sum(sum(proxy.garbled.values()) for proxy in self._proxies.values()),
        )

    # --- processes ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        config = self._folder / "mosquitto.conf"
        config.write_text(_MOSQUITTO.format(host=self._broker.host, port=self._broker.port), encoding="utf-8")
        self._add("broker", [find_program("mosquitto", "mosquitto"), "-c", str(config)], _BROKER_RESTART_S)
        self._processes["broker"].start()
        for fault in self._plan.faults:
            if fault.kind == "garble":
                self._proxies[fault.device] = Proxy(self._broker, fault.habits, self._plan.seed)
                self._stack.callback(self._proxies[fault.device].close)
        module = [sys.executable, "-m", "fleetune.tools.bench.chaos.server"]
        self._add("aggregator", [*module, self._spec("aggregator", tuple(DEVICES))], _RESTART_S)
        lost = {fault.device for fault in self._plan.faults if fault.kind == "lose-device"}
        for device in DEVICES:
            module = [sys.executable, "-m", "fleetune.tools.bench.chaos.agent"]
            command = self._network.command(device, [*module, self._spec(device, (device,))])
            self._add(device, command, None if device in lost else _RESTART_S)
        for name in ("aggregator", *DEVICES):
            self._processes[name].start()

    def _add(self, name: str, command: Sequence[str], restart_s: float | None) -> None:
        setpriv = find_program("setpriv", "util-linux")
        bound = [setpriv, "--pdeathsig", "KILL", *command]  # who leads the run may be killed, too
        self._processes[name] = process = _Process(
            bound, self._folder / f"{name}.log", restart_s, self._disks.get(name)
        )
        self._stack.callback(process.kill)

    def _spec(self, name: str, devices: tuple[str, ...]) -> str:
        address = self._proxies[name].address if name in self._proxies else self._broker
        spec = ChaosSpec(
            host=address.host,
            port=address.port,
            folder=str(self._folder / name),
            devices=devices,
            shapes=self._plan.shapes,
            rounds=self._plan.rounds,
            quorum=self._plan.quorum,
            buffer=self._plan.buffer,
            samples=DEVICES.get(name, 0),
            heard=str(self._folder / f"{name}.heard"),
            given=str(self._folder / f"{name}.given"),
            clock=str(self._folder / f"{name}.clock"),
            checkpoint_rounds=self._plan.checkpoint_rounds,
        )
        write_atomic(self._folder / f"{name}.clock", b"0")
        file = self._folder / f"{name}.json"
        write_atomic(file, msgspec.json.encode(spec))
        return str(file)

    # --- the run ------------------------------------------------------------------------------------------------

    def _follow(self, end: float) -> bool:
        aggregator = self._processes["aggregator"]
        while time.monotonic() < end:
            self._watch.look()
            for fault in list(self._waiting):
                if fault.version in self._watch.announced:
                    self._waiting.remove(fault)
                    self._later(fault.delay_s, lambda fault=fault: self._fire(fault))  # type: ignore[misc]
            while self._actions and self._actions[0][0] <= time.monotonic():
                heapq.heappop(self._actions)[2]()
            if aggregator.running is not None and aggregator.running.poll() == 0:
                self._watch.look()
                return True
            self._bury()
            for disk in self._disks.values():
                if disk.full:
                    disk.fill()
            time.sleep(_TICK_S)
        return False

    def _bury(self) -> None:
        """What has ended by itself is noted, and started again."""
        for name, process in self._processes.items():
            if process.running is not None and (code := process.running.poll()) is not None:
                if not process.found_no_room:  # without room nothing can start, and systemd tries again
                    self._ended.append(f"{name} ended with {code}: {process.last_words()}")
                process.running = None
                self._start_again(process)

    def _start_again(self, process: _Process) -> None:
        if process.restart_s is not None:
            self._later(process.restart_s, lambda: process.start() if process.running is None else None)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (time.monotonic() + delay_s, next(self._order), action))

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def _fire(self, fault: Fault) -> None:
        what, _, where = fault.kind.partition("-")
        victim = fault.device if where in ("", "device") else where
        self._fired.append((fault, time.monotonic()))
        if what in ("kill", "lose"):
            process = self._processes[victim]
            if process.running is not None:
                process.kill()
                self._start_again(process)
        elif what == "cut":
            self._network.cut(victim)
            self._later(_CUT_S, lambda: self._network.mend(victim))
        elif what == "slow":
            self._network.slow(victim, _SLOW_KBIT)
        elif what == "full":
            self._disks[victim].fill()
            self._later(_FULL_S, self._disks[victim].empty)
        elif what == "clock":
            self._jump(victim, fault.jump_s)

    def _jump(self, victim: str, seconds: int) -> None:
        """Bend a clock. Files there were keep their times; the kernel's clock stays, so these move the other way."""
        file = self._folder / f"{victim}.clock"
        write_atomic(file, str(int(file.read_text()) + seconds).encode())
        for path in (self._folder / victim).rglob("*"):
            try:
                status = path.stat()
                os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))
            except FileNotFoundError:
                continue  # gone meanwhile

    def _recovery_s(self, fault: Fault, at: float) -> float:
        back = fault.kind in ("kill-device", "cut", "full-device", "slow")
        return self._watch.next_closed(at, fault.device if back else "")


def unmount_below(folder: Path) -> None:
    """Let go of the disks of a run that was killed.

    Raises:
        RunFailedError: The kernel does not.
    """
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        source, place = line.split(" ")[:2]
        if source == _SOURCE and Path(place).is_relative_to(folder.resolve()):
            _system(find_program("umount", "mount"), "--lazy", place)


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailedError(f"{' '.join(command)}: {done.stderr.strip()}", "this process must be root")
