"""Electrical power and energy, where a board has a sensor for it: Jetson's INA3221 rails, or the processor's RAPL."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import msgspec

from fleetune.edge.resources.probes.tree import Tree

BOARD_RAILS = ("VDD_IN", "VIN", "POM_5V_IN", "5V_IN")
"""Rails that feed a whole module: Orin Nano and NX, Xavier NX, TX2; Thor; Nano."""

SPLIT_RAILS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
"""Rails that together feed a module which has no rail for all of it: AGX Orin, AGX Xavier."""

_HWMON = "/sys/class/hwmon"
_IIO = "/sys/bus/i2c/drivers/ina3221x"
_RAPL = "/sys/class/powercap"
_RAPL_PERIOD_S = 60.0  # the counter of a hot processor begins again after several minutes


class Rail(msgspec.Struct, frozen=True):
    """A rail with a sensor.

    Attributes:
        name: Such as ``VDD_IN``.
        power_w: Power in W; None if it cannot be read now.
    """

    name: str
    power_w: float | None


class Power(msgspec.Struct, frozen=True):
    """Power that is drawn now.

    Attributes:
        rails: Rails with a sensor.
        counter: Whether the processor counts the energy that it uses (RAPL); power is known to the meter then.
    """

    rails: tuple[Rail, ...]
    counter: bool

    @property
    def board_w(self) -> float | None:
        """Power of the whole module in W; None where no rail, and no known set of rails, stands for all of it.

        Rails are not simply added up: on most boards one feeds others.
        """
        power = {rail.name: rail.power_w for rail in self.rails}
        whole = next((power[name] for name in BOARD_RAILS if name in power), None)
        if whole is not None:
            return whole
        for names in SPLIT_RAILS:
            parts = [power.get(name) for name in names]
            known = [part for part in parts if part is not None]
            if len(known) == len(names):
                return sum(known)
        return None


def read_power(tree: Tree) -> Power:
    """Power that is drawn now."""
    return Power(rails=_read_hwmon(tree) or _read_iio(tree), counter=_rapl_j(tree) is not None)


def _read_hwmon(tree: Tree) -> tuple[Rail, ...]:
    """Rails of L4T r34 and later: millivolts and milliamperes of each channel."""
    rails = []
    for name in tree.names(_HWMON, "hwmon[0-9]+"):
        folder = f"{_HWMON}/{name}"
        if not (tree.text(f"{folder}/name", 64) or "").startswith("ina"):
            continue
        for file in tree.names(folder, "in[0-9]+_label"):
            channel = file[len("in") : -len("_label")]
            label = tree.text(f"{folder}/{file}", 64)
            if not label or label == "NC" or not tree.has(f"{folder}/curr{channel}_input"):
                continue  # not connected; or the sum over channels, which has no current
            volts = _milli(tree, f"{folder}/in{channel}_input")
            amperes = _milli(tree, f"{folder}/curr{channel}_input")
            rails.append(Rail(label, None if volts is None or amperes is None else volts * amperes))
    return tuple(rails)


def _read_iio(tree: Tree) -> tuple[Rail, ...]:
    """Rails of L4T r28 to r32: milliwatts of each channel."""
    rails = []
    for chip in tree.names(_IIO, "[0-9]+-[0-9a-f]+"):
        for device in tree.names(f"{_IIO}/{chip}", "iio:device[0-9]+"):
            folder = f"{_IIO}/{chip}/{device}"
            for file in tree.names(folder, "rail_name_[0-9]+"):
                label = tree.text(f"{folder}/{file}", 64)
                if label and label != "NC":
                    number = file.rpartition("_")[2]
                    rails.append(Rail(label, _milli(tree, f"{folder}/in_power{number}_input")))
    return tuple(rails)


def _milli(tree: Tree, path: str) -> float | None:
    value = tree.integer(path)
    return None if value is None else value / 1e3


def _rapl_j(tree: Tree) -> dict[str, tuple[float, float]] | None:
    """Joules counted by each processor package, and after how many its counter begins again; None without counters."""
    found = {}
    for zone in tree.names(_RAPL, "intel-rapl:[0-9]+"):  # AMD's counters have this name as well
        folder = f"{_RAPL}/{zone}"
        if not (tree.text(f"{folder}/name", 64) or "").startswith("package"):
            continue  # psys counts the packages again
        energy = tree.integer(f"{folder}/energy_uj")
        if energy is not None:
            found[zone] = (energy / 1e6, (tree.integer(f"{folder}/max_energy_range_uj") or 0) / 1e6)
    return found or None


class EnergyMeter:
    """Energy that the machine uses from now on, where a sensor tells.

    Power of rails is read a few times a second by a thread, and integrated (trapezoidal rule). A processor that counts
    joules is asked for the difference, and now and then by the thread, so that no turn of its counter is missed. That
    is the processor's energy alone: neither memory modules, nor disk, nor supply.

    Args:
        tree: Where the sensors are; where one that cannot be read is named.
        interval_s: Seconds between two readings of the rails.

    Attributes:
        source: ``rails``, ``rapl``, or None where there is no sensor.
    """

    def __init__(self, tree: Tree, *, interval_s: float = 0.25) -> None:
        self._tree = tree
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self._counted: dict[str, tuple[float, float]] = {}
        self._time, self._watts = time.monotonic(), read_power(tree).board_w
        self.source: str | None = None
        if self._watts is not None:
            self.source = "rails"
        else:
            self._counted = _rapl_j(tree) or {}
            self.source = "rapl" if self._counted else None
        if self.source is not None:
            period = interval_s if self.source == "rails" else _RAPL_PERIOD_S
            self._thread = threading.Thread(target=self._run, args=(period,), name="energy", daemon=True)
            self._thread.start()

    def joules(self) -> float | None:
        """Energy in J since the start, until now or until the meter was closed; None where there is no sensor."""
        if self.source is None:
            return None
        if not self._end.is_set():
            self._advance()
        with self._lock:
            return self._joules

    def close(self) -> None:
        """Take a last reading and stop the thread."""
        if self._thread is not None and not self._end.is_set():
            self._advance()
            self._end.set()
            self._thread.join()

    def _run(self, period: float) -> None:
        while not self._end.wait(period):
            self._advance()

    def _advance(self) -> None:
        with self._lock:
            if self.source == "rails":
                self._integrate()
            else:
                self._count()

    def _integrate(self) -> None:
        now, watts = time.monotonic(), read_power(self._tree).board_w
        if watts is None:
            return  # named in the tree; the next reading bridges the gap
        before = watts if self._watts is None else self._watts
        self._joules += (before + watts) / 2 * (now - self._time)
        self._time, self._watts = now, watts

    def _count(self) -> None:
        for zone, (joules, turn) in (_rapl_j(self._tree) or {}).items():
            before = self._counted.get(zone, (joules, turn))[0]
            self._joules += joules - before if joules >= before else joules + turn - before
            self._counted[zone] = (joules, turn)

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
