"""The processor's name, cores, features and level."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest

from fleetune.edge.resources.probes.processor import Processor, read_processor
from fleetune.edge.resources.probes.tree import Tree
from support.trees import plant, sample


@pytest.mark.parametrize(("board", "expected"), [
    ("jetson-nano-r32", Processor("Arm Cortex-A57", 2, 4, ("asimd",), "armv8.0-a")),
    ("orin-nano-r36", Processor("Arm Cortex-A78AE", 6, 6, ("asimd", "asimddp", "fphp", "asimdhp"), "armv8.2-a")),
    ("raspberry-pi-5", Processor("Arm Cortex-A76", 4, 4, ("asimd", "asimddp", "fphp", "asimdhp"), "armv8.2-a")),
    ("vm-x86-64", Processor("Intel(R) Xeon(R) Processor", 2, 2,
                            ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni"), "x86-64-v4")),
])  # fmt: skip
def test_boards(board: str, expected: Processor, tmp_path: Path) -> None:
    tree = plant(tmp_path, sample(board))
    assert read_processor(tree) == expected
    assert tree.skipped == ()


def arm(implementer: str, part: str, features: str) -> str:
    return f"processor\t: 0\nFeatures\t: {features}\nCPU implementer\t: {implementer}\nCPU part\t: {part}\n\n"


def read(tmp_path: Path, cpuinfo: str) -> Processor:
    return read_processor(plant(tmp_path, {"/proc/cpuinfo": cpuinfo}))


def test_two_kinds_of_cores_share_what_both_have(tmp_path: Path) -> None:
    """As on a Jetson TX2, or a big and a little cluster."""
    cpuinfo = arm("0x4e", "0x003", "fp asimd aes") + arm("0x41", "0xd07", "fp asimd atomics asimdrdm asimddp")
    processor = read(tmp_path, cpuinfo)
    assert processor.model == "NVIDIA Denver 2 + Arm Cortex-A57"
    assert (processor.cores, processor.features, processor.isa) == (2, ("asimd",), "armv8.0-a")


def test_a_core_that_we_do_not_know_keeps_its_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, arm("0x61", "0x023", "asimd")).model == "implementer 0x61, part 0x023"


@pytest.mark.parametrize(("flags", "isa"), [
    ("lm sse2", "x86-64"),
    ("lm cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3", "x86-64-v2"),
    ("lm cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 abm avx avx2 bmi1 bmi2 f16c fma movbe xsave", "x86-64-v3"),
    ("lm cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 abm avx avx2 bmi1 bmi2 f16c fma movbe", "x86-64-v2"),
    ("fpu sse", None),
])  # fmt: skip
def test_levels_of_x86(flags: str, isa: str | None, tmp_path: Path) -> None:
    processor = read(tmp_path, f"processor : 0\nmodel name : Some\nflags : {flags}\n")
    assert processor.isa == isa
    assert processor.model == "Some"


def test_no_processor_is_none(tmp_path: Path) -> None:
    assert read_processor(Tree(tmp_path)) == Processor(None, None, None, (), None)


@pytest.mark.parametrize(("present", "cores"), [("0-3,5", 5), ("0", 1), ("3-0", None), ("", None), ("a-b", None)])
def test_cores_that_are_present(present: str, cores: int | None, tmp_path: Path) -> None:
    tree = plant(tmp_path, {"/sys/devices/system/cpu/present": present})
    assert read_processor(tree).cores_present == cores
    assert bool(tree.skipped) == (cores is None)


def test_this_machine() -> None:
    processor = read_processor(Tree())
    assert processor.cores == psutil.cpu_count()
    assert processor.isa is not None
    assert processor.isa.startswith("x86-64" if platform.machine() == "x86_64" else "arm")
