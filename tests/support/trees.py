"""Trees of `/proc` and `/sys` to put under a probe's root: samples of boards, and small ones that a test writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fleetune.edge.resources.probes.tree import Tree

RECORDED = Path(__file__).parents[1] / "edge" / "probes" / "recorded"
BOARDS = sorted(path.stem for path in RECORDED.glob("*.txt"))

_HEADING = re.compile(r"^--- (/\S*)(?: -> (\S+))?\n", re.MULTILINE)


def plant(root: Path, files: Mapping[str, str]) -> Tree:
    """Write files below a root, by their path on the device; a text that begins with ``->`` makes a link."""
    for path, text in files.items():
        place = Path(f"{root}{path}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            place.symlink_to(text.removeprefix("->").strip())
        else:
            place.write_text(text, encoding="utf-8")
    return Tree(root)


def sample(board: str) -> dict[str, str]:
    """The files of a sample: see the README beside it."""
    parts = _HEADING.split((RECORDED / f"{board}.txt").read_text(encoding="utf-8"))[1:]
    return {
        path: f"->{link}" if link else text.replace(r"\0", "\0")
        for path, link, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def thermal_zone(root: Path, *, temperature_c: int, limit_c: int) -> Path:
    """The folder of a board's only thermal zone, ``CPU-therm``, which throttles from a limit on."""
    folder = root / "sys" / "class" / "thermal" / "thermal_zone0"
    folder.mkdir(parents=True)
    for name, text in (
        ("type", "CPU-therm"),
        ("temp", f"{temperature_c}000"),
        ("trip_point_0_type", "passive"),
        ("trip_point_0_temp", f"{limit_c}000"),
    ):
        (folder / name).write_text(f"{text}\n")
    return folder
