"""What a device says about itself: files of `/proc`, `/sys` and `/etc`, and the lines of its programs."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetune.edge.resources.probes.battery import read_batteries
from fleetune.edge.resources.probes.cgroup import read_cgroup
from fleetune.edge.resources.probes.memory import read_memory
from fleetune.edge.resources.probes.power import read_power
from fleetune.edge.resources.probes.pressure import PressureGauge, read_pressures
from fleetune.edge.resources.probes.processor import read_processor
from fleetune.edge.resources.probes.tegra import read_tegra
from fleetune.edge.resources.probes.tegrastats import parse_tegrastats
from fleetune.edge.resources.probes.thermal import read_thermal
from fleetune.edge.resources.probes.tree import Tree
from fleetune.tools.doctor.host import as_text, check_board, check_glibc, read_board
from fuzz.choices import Choices
from fuzz.mutations import mutate_bytes, of_lines
from fuzz.target import MEMORY, MIB, Target
from support.trees import BOARDS, plant, sample

MUTATIONS = [of_lines(mutate_bytes), mutate_bytes]
Files = dict[str, str]


def _files(pattern: str) -> list[Files]:
    """Of each sample board, what a probe reads."""
    boards = ({path: text for path, text in sample(board).items() if re.match(pattern, path)} for board in BOARDS)
    return [files for files in boards if any(not text.startswith("->") for text in files.values())]


class _Planted:
    """The files of a board below a root; one of them is another each time."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.plain = sorted(path for path, text in files.items() if not text.startswith("->"))
        self._root: Path | None = None
        self._changed = ""

    def plant(self, path: str, content: bytes) -> None:
        if self._root is None:
            self._root = Path(_keeper.name) / str(next(_numbers))
            plant(self._root, self.files)
        if self._changed:
            Path(f"{self._root}{self._changed}").write_text(self.files[self._changed], encoding="utf-8")
        Path(f"{self._root}{path}").write_bytes(content)
        self._changed = path

    @property
    def tree(self) -> Tree:
        assert self._root is not None
        return Tree(self._root)


_keeper = tempfile.TemporaryDirectory(prefix="fleetune-boards-", dir=MEMORY)
_numbers = itertools.count()


def probe(name: str, pattern: str, read: Callable[[Tree], Any], more: Files | None = None) -> Target:
    """A probe over a sample of which one file is another."""
    boards = [_Planted({**files, **(more or {})}) for files in _files(pattern) or [{}]]

    def make(choices: Choices) -> bytes:
        number = choices.below(len(boards))
        path = choices.pick(boards[number].plain)
        data = boards[number].files[path].encode()
        for _ in range(0 if choices.spent else choices.pick([1, 1, 2])):
            data = choices.pick(MUTATIONS)(choices, data)
        boards[number].plant(path, data)  # here, where nobody watches what is written
        return b"%d" % number

    def run(data: bytes, _folder: Path) -> None:
        tree = boards[int(data)].tree
        read(tree)
        assert all(note.isascii() or "…" in note for note in tree.skipped)

    return Target(name, make, run, (), memory=8 * MIB)


def pressure(tree: Tree) -> None:
    read_pressures(tree, "/sys/fs/cgroup/x")
    with PressureGauge(tree, "/sys/fs/cgroup/x") as gauge:
        found = gauge.read()
        assert found is None or 0 <= found.some_share <= 1


def power(tree: Tree) -> None:
    assert read_power(tree).board_w is None or True


def thermal(tree: Tree) -> None:
    found = read_thermal(tree)
    assert found.margin_c is None or abs(found.margin_c) < 1000
    found.throttling  # noqa: B018


def batteries(tree: Tree) -> None:
    for battery in read_batteries(tree):
        battery.time_left_s  # noqa: B018


def tegra(tree: Tree) -> None:
    read_tegra(tree)


def host(tree: Tree) -> None:
    board = read_board(tree.path("/"), "aarch64", (3, 10))
    assert all(char.isprintable() or char == "\n" for char in as_text(check_board(board)))


def tegrastats(data: bytes, _folder: Path) -> None:
    found = parse_tegrastats(data.decode(errors="replace"))
    assert len(found.text) <= 1 << 16


def libc(data: bytes, _folder: Path) -> None:
    as_text(check_glibc(data.decode(errors="replace"), (3, 10)))


LINE = (
    b"07-01-2026 12:00:00 RAM 1921/3964MB (lfb 2x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU "
    b"[12%@1479,off,3%@1479,off] EMC_FREQ 3%@1600 GR3D_FREQ 0%@76 APE 25 PLL@30C CPU@33.5C PMIC@100C GPU@31C "
    b"thermal@32.25C POM_5V_IN 2020/2020 POM_5V_GPU 40/40 VDD_IN 4833mW/4833mW NVENC off MTS fg 0% bg 0%"
)
GROUPS = {
    "/proc/self/cgroup": "0::/a/b\n",
    "/proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
    "/sys/fs/cgroup/cgroup.controllers": "memory cpu\n",
    "/sys/fs/cgroup/a/memory.max": "1000000\n",
    "/sys/fs/cgroup/a/b/memory.max": "max\n",
    "/sys/fs/cgroup/a/b/memory.current": "5000\n",
    "/sys/fs/cgroup/a/b/memory.events": "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n",
}
STALLS = "some avg10=0.00 avg60=0.12 avg300=1.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n"
PRESSURE = {
    **{f"/proc/pressure/{kind}": STALLS for kind in ("memory", "cpu", "io")},
    "/sys/fs/cgroup/x/memory.pressure": STALLS,
    "/proc/vmstat": "pgmajfault 12\npswpin 0\npswpout 3\nallocstall_normal 4\npgscan_direct 9\n",
}
BATTERY = {
    "/sys/class/power_supply/BAT0/type": "Battery\n",
    "/sys/class/power_supply/BAT0/capacity": "55\n",
    "/sys/class/power_supply/BAT0/status": "Discharging\n",
    "/sys/class/power_supply/BAT0/voltage_now": "11000000\n",
    "/sys/class/power_supply/BAT0/power_now": "5000000\n",
    "/sys/class/power_supply/BAT0/charge_now": "3000000\n",
}
SYSTEM = {
    "/etc/os-release": 'ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "/proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "/etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004\n",
    "/proc/sys/kernel/osrelease": "4.9.253-tegra\n",
}


def _lines(choices: Choices) -> bytes:
    data = LINE
    for _ in range(0 if choices.spent else choices.pick([1, 1, 2, 3])):
        data = mutate_bytes(choices, data)
    return data


TARGETS = [
    probe("cgroup", r"/proc/self/(cgroup|mountinfo)|/sys/fs/cgroup", read_cgroup, GROUPS),
    probe("memory", r"/proc/(meminfo|swaps)|/sys/block", read_memory),
    probe("pressure", r"/proc/pressure|/proc/vmstat", pressure, PRESSURE),
    probe("processor", r"/proc/cpuinfo|/sys/devices/system/cpu", read_processor),
    probe("thermal", r"/sys/class/thermal|/sys/devices/(virtual|platform)", thermal),
    probe("power", r"/sys/(class/hwmon|bus/i2c|class/powercap)", power),
    probe("battery", r"/sys/class/power_supply", batteries, BATTERY),
    probe("tegra", r"/proc/device-tree|/etc/nv|/var/lib/nvp", tegra, SYSTEM),
    probe("host", r"/proc/device-tree|/etc", host, SYSTEM),
    Target("tegrastats", _lines, tegrastats, ()),
    Target("C library", lambda choices: mutate_bytes(choices, b"glibc 2.35"), libc, ()),
]
