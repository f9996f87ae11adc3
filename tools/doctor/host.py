"""What must hold before Fleetune can be installed: the board, its Python, its C library.

This file also runs alone, on a board as it was flashed: ``python3 host.py [--json]``. It therefore imports nothing but
the standard library, and is written for Python 3.6.
"""

import argparse
import json
import os
import platform
import re
import struct
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

WIDTH = 80
"""Columns of a terminal on a serial line."""

BOARD, PYTHON, GLIBC = 30, 31, 32
"""Exit codes of this file's checks; docs/exit-codes.md has all."""

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)

_MACHINES = ("aarch64", "armv8l", "x86_64")  # a 32-bit process may see an aarch64 kernel as armv8l
_LIMIT = 4096  # bytes of a file that names something
_STOCK = ("ubuntu 16.04", "ubuntu 18.04")  # of L4T up to r32
_KERNELS = {"4.9.": 32, "5.10.": 35, "5.15.": 36, "6.8.": 38}  # of L4T, where a container hides its release


class Check(NamedTuple):
    """What one check found.

    Attributes:
        name: What was looked at.
        verdict: ``ok``, ``note`` (it works, but know this) or ``failure``.
        found: What there is.
        fix: What to do; empty where there is nothing to do.
        code: Exit code of a failure; else 0.
    """

    name: str
    verdict: str
    found: str
    fix: str = ""
    code: int = 0


class Board(NamedTuple):
    """A board and the system on it.

    Attributes:
        name: Its name in the device tree, or what its processor is called.
        machine: Architecture of its kernel, such as ``aarch64``.
        l4t: Release of L4T, such as ``32.7.1``; empty if this is no Jetson.
        system: The userland, such as ``Ubuntu 22.04.5 LTS``; empty where it does not say.
        tier: Platform tier, ``t0`` to ``t4``; empty if it is in none.
    """

    name: str
    machine: str
    l4t: str
    system: str
    tier: str


def read_board(
    root: Path = Path("/"), machine: str = platform.machine(), python: "tuple[int, ...]" = sys.version_info[:2]
) -> Board:
    """The board and its tier.

    Args:
        root: Where `/proc` and `/etc` are.
        machine: Architecture of the kernel.
        python: Version of Python, which tells a stock system where nothing else does.
    """
    system = dict(re.findall(r'^(\w+)="?(.*?)"?$', _text(root, "etc/os-release"), re.MULTILINE))
    l4t = _l4t(root)
    return Board(
        name=_text(root, "proc/device-tree/model") or machine.replace("_", "-"),
        machine=machine,
        l4t=l4t,
        system=system.get("PRETTY_NAME", ""),
        tier=_tier(l4t, machine, f"{system.get('ID', '')} {system.get('VERSION_ID', '')}".strip(), python),
    )


def _text(root: Path, path: str) -> str:
    try:
        with (root / path).open("rb") as file:
            return file.read(_LIMIT).decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""  # most boards lack most of these files, and what cannot be read says as little


def _l4t(root: Path) -> str:
    release = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", _text(root, "etc/nv_tegra_release"))
    if release is not None:
        return "{}.{}".format(*release.groups())
    kernel = _text(root, "proc/sys/kernel/osrelease")
    if "tegra" not in kernel:
        return ""
    return next((str(major) for start, major in _KERNELS.items() if kernel.startswith(start)), "")


def _numbers(version: str) -> "tuple[int, ...]":
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _tier(l4t: str, machine: str, system: str, python: "tuple[int, ...]") -> str:
    if machine not in _MACHINES:
        return ""
    if not l4t:
        return "t4"
    major = _numbers(l4t)[0]
    if major > 32:
        return "t3" if major >= 38 else "t2" if major >= 36 else ""
    if system in _STOCK or (not system and python < (3, 7)):
        return "t0"
    return "t1" if system in ("ubuntu 22.04", "") else ""


def check_board(board: Board) -> Check:
    """Whether Fleetune supports the board with this system."""
    found = ", ".join(part for part in (board.name, board.l4t and f"L4T {board.l4t}", board.system) if part)
    if board.tier == "t0":
        return Check(
            "board",
            "failure",
            f"{found}: tier T0, the stock system, is not supported: its Python is 3.6, and Fleetune and its wheels "
            "need 3.10",
            "move to tier T1: keep the L4T kernel and give the board an Ubuntu 22.04 userland, which has Python 3.10",
            BOARD,
        )
    if board.machine not in _MACHINES:
        return Check(
            "board",
            "failure",
            f"{found}: the kernel is {board.machine}, for which ONNX Runtime has no wheels",
            "install a 64-bit system (aarch64 or x86_64), if the processor takes one",
            BOARD,
        )
    if not board.tier:
        return Check(
            "board",
            "note",
            f"{found}: in no platform tier, so never tested",
            "use L4T r32 with Ubuntu 22.04 (T1), JetPack 6 (T2) or JetPack 7 (T3) on a Jetson",
        )
    return Check("board", "ok", f"{found}: tier {board.tier.upper()}")


def check_python(
    version: "tuple[int, ...]" = sys.version_info[:3],
    bits: int = struct.calcsize("P") * 8,
    machine: str = platform.machine(),
    implementation: str = platform.python_implementation(),
) -> Check:
    """Whether wheels exist for this Python.

    Args:
        version: Its version.
        bits: Size of its pointers.
        machine: Architecture of the kernel.
        implementation: Such as ``CPython``.
    """
    found = "{} {}, {}-bit".format(implementation, ".".join(map(str, version)), bits)
    install = "install Python 3.10, 3.11 or 3.12 (Ubuntu 22.04: apt install python3.10-venv)"
    if bits != 64:
        return Check(
            "python",
            "failure",
            f"{found}, on a kernel for {machine}: ONNX Runtime has no wheels for a 32-bit userland",
            "flash a 64-bit userland (arm64, not armhf); a 64-bit kernel alone is not enough",
            PYTHON,
        )
    if implementation != "CPython" or version[:2] < OLDEST_PYTHON:
        return Check(
            "python", "failure", f"{found}: Fleetune and its wheels need CPython 3.10 or newer", install, PYTHON
        )
    if version[:2] > NEWEST_PYTHON:
        return Check("python", "note", f"{found}: newer than what Fleetune is tested with", install)
    return Check("python", "ok", found)


def needed_glibc(python: "tuple[int, ...]") -> "tuple[int, int]":
    """The oldest glibc that the pinned wheels for a version of Python run with (their manylinux tags)."""
    return (2, 27) if python[:2] <= (3, 10) else (2, 28)


def read_glibc() -> str:
    """Such as ``glibc 2.35``; empty where the C library is another one."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):  # musl does not know the name
        return ""


def check_glibc(libc: str = read_glibc(), python: "tuple[int, ...]" = sys.version_info[:2]) -> Check:
    """Whether the wheels run with this C library.

    Args:
        libc: Its name and version.
        python: Version of Python, which decides which wheels are installed.
    """
    needed = "glibc " + ".".join(map(str, needed_glibc(python)))
    remedy = f"use a system with {needed} or newer: Ubuntu 22.04, Debian 12"
    if not libc.startswith("glibc "):
        return Check(
            "glibc",
            "failure",
            "the C library is not glibc (musl, as on Alpine?): ONNX Runtime has wheels for glibc alone",
            remedy,
            GLIBC,
        )
    if _numbers(libc)[:2] < needed_glibc(python):
        return Check("glibc", "failure", f"{libc}: the wheels need {needed}", remedy, GLIBC)
    return Check("glibc", "ok", "{}; the wheels need {}".format(libc, needed[len("glibc ") :]))


def as_text(check: Check) -> str:
    """A check as lines of at most :data:`WIDTH` columns."""
    start = f"{check.verdict:8} {check.name:8} "
    paragraphs = [check.found]
    if check.fix:
        paragraphs.append((f"fix (exit code {check.code}): " if check.code else "advice: ") + check.fix)
    lines = []
    for paragraph in paragraphs:
        paragraph = "".join(char if char.isprintable() else " " for char in paragraph)
        lines += textwrap.wrap(paragraph, WIDTH - len(start), break_on_hyphens=False) or [""]
    return "\n".join((start if number == 0 else " " * len(start)) + line for number, line in enumerate(lines))


def as_document(board: Board, checks: "list[Check]") -> "dict[str, object]":
    """All checks as one document for JSON."""
    return {"board": board.name, "tier": board.tier or None, "checks": [check._asdict() for check in checks]}


def exit_code(checks: "list[Check]") -> int:
    """That of the first failure; 0 without one."""
    return next((check.code for check in checks if check.code), 0)


def check_host(board: Board) -> "list[Check]":
    """The checks of this file."""
    return [check_board(board), check_python(), check_glibc()]


def main() -> None:
    """Check this machine, print what was found, and leave with the exit code."""
    parser = argparse.ArgumentParser(description="Say whether Fleetune can be installed on this device.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    board = read_board()
    checks = check_host(board)
    text = json.dumps(as_document(board, checks), indent=2) if args.json else "\n".join(map(as_text, checks))
    print(text)  # noqa: T201
    sys.exit(exit_code(checks))


if __name__ == "__main__":
    main()
