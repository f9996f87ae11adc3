"""All probes at once: every sample and this machine, quickly, as JSON, and with whatever text its files hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.resources.probes.machine import Machine, probe
from fleetune.edge.resources.probes.power import EnergyMeter
from fleetune.edge.resources.probes.pressure import PressureGauge
from fleetune.edge.resources.probes.tegra import PowerMode
from fleetune.edge.resources.probes.tree import Tree
from support.trees import BOARDS, plant, sample


@pytest.mark.parametrize("board", BOARDS)
def test_a_sample_is_read_whole_and_survives_json(board: str, tmp_path: Path) -> None:
    plant(tmp_path, sample(board))
    machine = probe(tmp_path, folder=tmp_path)
    assert machine.skipped == ()
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine
    assert machine.kernel is not None
    assert machine.disk is not None


def test_the_boards_names(tmp_path: Path) -> None:
    names = {}
    for board in BOARDS:
        plant(tmp_path / board, sample(board))
        names[board] = probe(tmp_path / board).board
    assert names == {
        "jetson-nano-r32": "NVIDIA Jetson Nano Developer Kit",
        "orin-nano-r36": "NVIDIA Jetson Orin Nano Developer Kit",
        "raspberry-pi-5": "Raspberry Pi 5 Model B Rev 1.0",
        "vm-x86-64": None,
    }


def test_the_groups_pressure_is_that_of_its_own_group(tmp_path: Path) -> None:
    plant(tmp_path, sample("orin-nano-r36"))
    waiting = probe(tmp_path).pressure.cgroup_memory
    assert waiting is not None
    assert waiting.some is not None
    assert waiting.some.avg10_percent == 2.5


def test_an_empty_machine_has_nothing_and_nothing_is_skipped(tmp_path: Path) -> None:
    machine = probe(tmp_path)
    assert machine.skipped == ()
    assert machine.memory.total_mib is None
    assert machine.cgroup is machine.board is machine.tegra is None


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    plant(tmp_path, sample("jetson-nano-r32") | {"/sys/class/thermal/thermal_zone3/temp": "warm"})
    machine = probe(tmp_path)
    assert machine.skipped == ("/sys/class/thermal/thermal_zone3/temp: not a number: 'warm'",)
    assert machine.thermal.zones[3].temperature_c is None


def test_programs_are_run_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    plant(root, sample("jetson-nano-r32") | {"/bin/nvpmodel": "#!/bin/sh\necho 'NV Power Mode: MAXN'; echo 0\n"})
    (root / "bin/nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}/bin")
    modes = [machine.tegra and machine.tegra.power_mode for machine in (probe(root), probe(root, commands=True))]
    assert modes == [PowerMode("5W", 1), PowerMode("MAXN", 0)]


def test_this_machine_is_read_in_a_tenth_of_a_second() -> None:
    probe()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        machine = probe()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
    assert machine.memory.total_mib
    assert machine.disk is not None
    assert machine.disk.write_mib_per_s is None


def test_writing_is_measured_on_request(tmp_path: Path) -> None:
    disk = probe(folder=tmp_path, write=True).disk
    assert disk is not None
    assert disk.write_mib_per_s is not None


def test_probes_need_no_numpy() -> None:
    script = "import sys; from fleetune.edge.resources.probes.machine import probe; probe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numpy", "onnxruntime", "psutil", "yaml"} & set(done.stdout.split())


# --- whatever the files hold ---------------------------------------------------------------------------------------

FILES = {board: sample(board) for board in BOARDS}
PLACES = [(board, path) for board, files in FILES.items() for path, text in files.items() if not text.startswith("->")]

fragments = st.sampled_from([
    *("\n", " ", ":", "\0", "\t", "-", ",", "/", "\\040", "max", "kB", "some", "full avg10=1.00", "0x41", "processor:"),
    *("-1", "1_0", "nan", "inf", "1e999", "9" * 30, "18446744073709551615", "9223372036854771712", "٣", "é"),
])  # fmt: skip
broken = st.lists(fragments | st.text(max_size=6), max_size=12).map("".join)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A sample's files, one to three of them replaced, or altered within a line."""
    board, _ = draw(st.sampled_from(PLACES))
    paths = [path for of, path in PLACES if of == board]
    files = {}
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)):
        text, piece = FILES[board][path], draw(broken)
        at = draw(st.integers(0, len(text)))
        until = draw(st.integers(at, len(text)))
        files[path] = draw(st.sampled_from([piece, text[:at] + piece + text[until:], text[:at]]))
    return board, files


@pytest.fixture(scope="module")
def roots() -> Iterator[dict[str, Path]]:
    folder = Path(tempfile.mkdtemp())
    yield {board: Path(plant(folder / board, files).path("")) for board, files in FILES.items()}
    shutil.rmtree(folder)


@given(damages())
@settings(max_examples=100)
def test_no_text_makes_a_probe_fail(roots: dict[str, Path], damage: tuple[str, dict[str, str]]) -> None:
    board, files = damage
    root = roots[board]
    try:
        for path, text in files.items():
            Path(f"{root}{path}").write_bytes(text.encode(errors="surrogatepass"))
        machine = probe(root)
        assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine
        assert machine.thermal.throttling in (True, False, None)
        assert machine.power.board_w is None or machine.power.board_w < 1 << 64
        assert all(note.isprintable() and len(note) <= 250 for note in machine.skipped)
        tree = Tree(root)
        with PressureGauge(tree) as gauge:
            gauge.read()
        with EnergyMeter(tree) as meter:
            meter.joules()
    finally:
        for path in files:
            Path(f"{root}{path}").write_text(FILES[board][path], encoding="utf-8")
