"""What was measured stands in a profile beside what is declared, and is read back as it was."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.trial import Trial
from fleetune.profiles.measured import Measured
from fleetune.profiles.profile import Profile, detect_profile, read_profile, write_profile


def trial(depth: int, micro_batch: int, length: int, recompute: bool) -> Trial:
    return Trial(
        depth=depth,
        micro_batch=micro_batch,
        length=length,
        recompute=recompute,
        base_mib=40.1234567,
        frozen_mib=60,
        peak_mib=60 + depth + micro_batch * length / 7,
        step_s=0.01 * depth,
        step_cpu_s=0.02 * depth,
        forward_s=0.001,
        forward_cpu_s=0.002,
    )


TRIALS = tuple(trial(*cell) for cell in itertools.product((1, 3), (2, 16), (8, 32), (False, True)))
COSTS = Costs(
    pack="ab" * 32,
    kit="0.1.0",
    onnxruntime="1.23.2",
    machine="aarch64",
    threads=0,
    power_mode="4 cores, 1479 MHz",
    trials=TRIALS,
)
MEASURED = Measured(
    taken="2026-01-31T12:00:00Z",
    device="NVIDIA Jetson Nano Developer Kit",
    kernel="4.9.337-tegra",
    memory_mib=3956,
    backbone="minilm",
    costs=COSTS,
)


def write(path: Path, *measured: Measured) -> Profile:
    profile = msgspec.structs.replace(read_profile("jetson-nano-4gb"), name=path.stem, measured=measured)
    write_profile(path, profile)
    return profile


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "cam.yaml"
    written = write(file, MEASURED)
    found = read_profile(str(file))
    assert msgspec.structs.replace(found, measured=()) == msgspec.structs.replace(written, measured=())
    (measured,) = found.measured
    assert measured.costs.trials[0].base_mib == pytest.approx(40.1234567, rel=1e-5)
    assert measured.costs.model.growth_mib(2, 4, 16, recompute=True) == pytest.approx(
        COSTS.model.growth_mib(2, 4, 16, recompute=True), rel=1e-3
    )
    assert len(file.read_text().splitlines()) < 100  # a line a trial


def test_who_reads_a_profile_needs_no_numpy(tmp_path: Path) -> None:
    """A board's first boot, for one: NumPy takes it longer than all else that it loads."""
    file = tmp_path / "cam.yaml"
    write(file, MEASURED)
    script = (
        "import sys; from fleetune.profiles.profile import read_profile; import fleetune.tools.firstboot.steps; "
        "assert read_profile(sys.argv[1]).measured[0].costs.trials; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=True, timeout=60)
    assert not {"numpy", "onnxruntime"} & set(done.stdout.split())


def test_the_signature_is_not_part_of_what_is_signed() -> None:
    signed = msgspec.structs.replace(MEASURED, key="nano-1", signature="ab")
    assert signed.signed() == MEASURED.signed()
    assert msgspec.structs.replace(MEASURED, kernel="5").signed() != MEASURED.signed()


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        ({"memory_mib": 5000}, "memory_mib", "5000 MiB are more than the board's 4GiB"),
        ({"memory_mib": 62}, r"costs.trials[0].peak_mib", "more than the machine's 62"),
        ({"trials": {"peak_mib": 30.0}}, "costs.trials[0].peak_mib", "a peak only grows"),
        ({"trials": {"base_mib": 61.0}}, "costs.trials[0].peak_mib", "a peak only grows"),
    ],
)
def test_what_cannot_be_true_together_is_refused(
    tmp_path: Path, changed: dict[str, object], field: str, message: str
) -> None:
    first = msgspec.structs.replace(TRIALS[0], **changed.pop("trials", {}))  # type: ignore[arg-type]
    costs = msgspec.structs.replace(COSTS, trials=(first, *TRIALS[1:]))
    file = tmp_path / "cam.yaml"
    write(file, msgspec.structs.replace(MEASURED, costs=costs, **changed))
    with pytest.raises(ConfigError) as caught:
        read_profile(str(file))
    assert f"field measured[0].{field}: " in caught.value.what
    assert message in caught.value.what
    assert caught.value.what.startswith(f"{file}, line ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step_s: 0.01,", "step_s: 0.01, speed: 3,", r"measured[0].costs.trials[0].speed: there is no such field"),
        ("depth: 1,", "depth: 0,", "measured[0].costs.trials[0].depth: "),
        ("peak_mib: 63.2857,", "peak_mib: -1,", "measured[0].costs.trials[0].peak_mib: "),
        ("kernel: 4.9.337-tegra", "", "measured[0]: "),
        ("threads: 0", "threads: none", "measured[0].costs.threads: "),
        ("power_mode: 4 cores, 1479 MHz", "power_mode: MAXN", "measured[0].costs.power_mode: "),
    ],
)
def test_a_bad_table_is_refused_with_its_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "cam.yaml"
    write(file, MEASURED)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_profile(str(file))
    assert message in caught.value.what
    assert str(file) in caught.value.what


def test_one_pack_is_there_once_for_each_power_mode_and_number_of_threads(tmp_path: Path) -> None:
    file = tmp_path / "cam.yaml"
    slower = msgspec.structs.replace(COSTS, power_mode="2 cores, 918 MHz")
    write(file, MEASURED, msgspec.structs.replace(MEASURED, costs=slower))
    assert len(read_profile(str(file)).measured) == 2
    write(file, MEASURED, msgspec.structs.replace(MEASURED, taken="2026-02-01T12:00:00Z"))
    with pytest.raises(ConfigError, match=r"field measured\[1\]: the same pack, threads and power mode"):
        read_profile(str(file))


@pytest.mark.parametrize(
    ("device_tree", "memory_mib", "machine", "name"),
    [
        ("NVIDIA Jetson Nano Developer Kit", 3956, "aarch64", "jetson-nano-4gb"),
        ("NVIDIA Jetson Nano 2GB Developer Kit", 1972, "aarch64", "jetson-nano-2gb"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7607, "aarch64", "orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3600, "aarch64", "orin-nano-4gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15655, "aarch64", "orin-nx-16gb"),
        ("Raspberry Pi 5 Model B Rev 1.0", 4045, "aarch64", "raspberry-pi-5"),
        ("Raspberry Pi 5 Model B Rev 1.0", 8063, "aarch64", None),  # of another size than the shipped one
        ("Some Board", 4000, "aarch64", None),
        (None, 24000, "x86_64", "x86-64"),
        (None, 4000, "aarch64", None),
    ],
)
def test_a_board_is_known_by_its_device_tree_and_its_memory(
    device_tree: str | None, memory_mib: float, machine: str, name: str | None
) -> None:
    found = detect_profile(device_tree, memory_mib, machine)
    assert (found.name if found else None) == name
