"""A device that QEMU emulates: a board's processor, Debian's Python, a device's wheels, and Fleetune as it is here."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulated.board import Board
from emulated.root import GLIBC, PYTHON, debian_root
from support.lacking import lacking
from support.wheels import ROOT, pins, plain_install, wheels

BROKER = "iotcore"
"""The embedded broker is no part of the plain install, but a fleet's aggregator may live on a board as well."""


@dataclass(frozen=True)
class Device:
    """Where to start Python.

    Attributes:
        python: The interpreter; it starts in the emulator.
        site: The folder of the wheels.
        pinned: Name → version of each.
        env: Environment of its processes, and nothing else.
    """

    python: Path
    site: Path
    pinned: Mapping[str, str]
    env: Mapping[str, str]

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start Python."""
        return subprocess.Popen([str(self.python), *map(str, arguments)], env=dict(self.env), text=True, **options)

    def run(self, *arguments: str | Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run Python to its end."""
        with self.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def make_device(folder: Path, board: Board, python_full_version: str) -> Device:
    """A device in ``folder``, with the versions that ``constraints.txt`` pins for a version of Python.

    The wheels are those versions' builds for the root's Python, which is 3.11.
    """
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        lacking("needs qemu-user-static: apt-get install qemu-user-static")
    known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False)  # exits with 1
    if board.cpu not in known.stdout.split():
        lacking(f"needs a qemu-user-static that knows the {board.cpu}: QEMU 7.1 or later")
    debian = debian_root()
    root, site, home = folder / "root", folder / "site", folder / "home"
    for own in (root, site / "fleetune", home):
        own.mkdir(parents=True)
    for shared in debian.iterdir():
        (root / shared.name).symlink_to(shared)
    board.describe(root)

    pinned = pins(
        python_full_version=python_full_version,
        python_version=python_full_version.rpartition(".")[0],
        platform_machine="aarch64",
    )
    oldest, newest = 17, GLIBC[1]
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(oldest, newest + 1))]
    target = ["--implementation=cp", "--python-version=3.11", *(f"--platform={tag}" for tag in platforms)]
    # pip chooses for the root's Python, and would then refuse what does not suit the Python that runs it.
    options = [*target, "--ignore-requires-python"]
    installed = wheels("arm64", [*sorted(plain_install()), BROKER], *options, pinned=pinned)

    for part in ("edge", "server", "profiles", "tools"):
        (site / "fleetune" / part).symlink_to(ROOT / part)
    kit = importlib.metadata.distribution("fleetune")
    metadata = site / f"fleetune-{kit.version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(kit.read_text("METADATA") or kit.read_text("PKG-INFO") or "", encoding="utf-8")
    env = {
        "HOME": str(home),
        "ORT_DISABLE_TELEMETRY": "1",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, (site, installed))),
        "PYTHONUNBUFFERED": "1",
        "QEMU_CPU": board.cpu,
    }
    return Device(root / PYTHON, installed, pinned, env)
