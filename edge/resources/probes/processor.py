"""The processor: its name, its cores, and the instructions that decide how fast it trains."""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

from fleetune.edge.resources.probes.tree import Tree

FEATURES = (
    *("neon", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
    *("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni"),
)
"""Instructions that matter to us, as `/proc/cpuinfo` names them: vectors, dot products, float16, int8."""

# Main ID register: implementer and part, as in Arm's technical reference manuals and the kernel's cputype.h.
_CORES = {
    ("0x41", "0xd03"): "Arm Cortex-A53",
    ("0x41", "0xd05"): "Arm Cortex-A55",
    ("0x41", "0xd07"): "Arm Cortex-A57",
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd42"): "Arm Cortex-A78AE",
    ("0x41", "0xd83"): "Arm Neoverse-V3AE",
    ("0x4e", "0x003"): "NVIDIA Denver 2",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}

# Which features a level brings; a core has it if it has these. Arm's optional ones (fphp, asimddp) decide nothing.
_ARM_LEVELS = {
    "armv9.0-a": {"sve2"},
    "armv8.2-a": {"atomics", "asimdrdm", "dcpop"},
    "armv8.1-a": {"atomics", "asimdrdm"},
    "armv8.0-a": {"asimd"},
}
_V2 = {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_X86_LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2, "x86-64": {"lm"}}

_LIMIT = 2 << 20  # a server with hundreds of cores


class Processor(msgspec.Struct, frozen=True):
    """What `/proc/cpuinfo` says of the cores that are switched on.

    Attributes:
        model: Name of the cores, such as ``Arm Cortex-A57``; two names where there are two kinds.
        cores: Cores that are switched on.
        cores_present: Cores that the board has; a power mode may have switched some off.
        features: Those of :data:`FEATURES` that every core has.
        isa: Architecture level that every core reaches, such as ``armv8.2-a`` or ``x86-64-v3``.
    """

    model: str | None
    cores: int | None
    cores_present: int | None
    features: tuple[str, ...]
    isa: str | None


def read_processor(tree: Tree) -> Processor:
    """The processor."""
    cores = [_fields(block) for block in re.split(r"\n\s*\n", tree.text("/proc/cpuinfo", _LIMIT) or "")]
    cores = [core for core in cores if "processor" in core]
    names = dict.fromkeys(name for name in map(_name, cores) if name)
    features = set.intersection(*map(_features, cores)) if cores else set()
    return Processor(
        model=" + ".join(names) or None,
        cores=len(cores) or None,
        cores_present=_cores_present(tree),
        features=tuple(feature for feature in FEATURES if feature in features),
        isa=_isa(features),
    )


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _name(core: dict[str, str]) -> str | None:
    part = (core.get("CPU implementer", "").lower(), core.get("CPU part", "").lower())
    if all(part):
        return _CORES.get(part, f"implementer {part[0]}, part {part[1]}")
    return core.get("model name")


def _features(core: dict[str, str]) -> set[str]:
    return set((core.get("Features") or core.get("flags") or "").split())


def _isa(features: Collection[str]) -> str | None:
    levels = _ARM_LEVELS | _X86_LEVELS
    return next((level for level, needed in levels.items() if needed <= set(features)), None)


def _cores_present(tree: Tree) -> int | None:
    path = "/sys/devices/system/cpu/present"
    text = tree.text(path)
    if text is None:
        return None
    count = 0
    for part in text.split(","):  # such as 0-3,5
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            tree.skip(path, f"not understood: {text!r}")
            return None
        count += int(match[2] or match[1]) - int(match[1]) + 1
    return count
