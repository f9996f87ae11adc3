"""The emulated board as labgrid has it: an environment with QEMU, and its disk, seed and rig."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.emulator.board import BoardImage, EmulatedBoard, clear_folder, flash_boards
from fleetune.tools.emulator.image import Image
from fleetune.tools.emulator.machine import BOOT, CONSOLE, CPU, MACHINE, peripherals
from fleetune.tools.hil.environment import DEVICE_OPTION, MODULE, TTY_OPTION
from fleetune.tools.programs import find_program

ENVIRONMENT, RIG = "environment.yaml", "rig"
_AGENT = "agent"
_LONGEST = 100
"""Of the 107 bytes that a socket's address may have."""

_PROGRAMS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "mmdebstrap": "mmdebstrap",
    "mosquitto": "mosquitto",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
}

BOARDS = {
    board.name: board
    for board in (
        EmulatedBoard("qemu-nano-2g", "jetson-nano-2gb", 2048),
        EmulatedBoard("qemu-nano-4g", "jetson-nano-4gb", 4096),
    )
}


@dataclass(frozen=True)
class Place:
    """What was made for one.

    Attributes:
        environment: Labgrid's.
        rig: The fleet's own side.
        disks: With the image, and with the seed.
    """

    environment: Path
    rig: Path
    disks: tuple[Path, Path]


def check_programs() -> None:
    """See that what runs an emulated board is here, before anything is built.

    Raises:
        ConfigError: A program is missing.
    """
    for program, package in _PROGRAMS.items():
        find_program(program, package)


def set_up(board: EmulatedBoard, made: BoardImage, folder: Path) -> Place:
    """Make all that a run with an emulated board needs; what an earlier run left there goes.

    Args:
        board: Which.
        made: What it starts from.
        folder: For rig, disk, and environment.

    Raises:
        ConfigError: A program is missing, or the folder's name is too long for a socket.
        RunFolderError: The folder has something else in it.
    """
    agent = (folder / _AGENT).resolve()
    if len(str(agent)) > _LONGEST:
        raise ConfigError(f"--out: {folder} is too long a name for a socket in it", "choose a shorter one")
    clear_folder(folder, RIG)
    file, rig = folder / ENVIRONMENT, folder / RIG
    ((disk, seed),) = flash_boards([board], made, "hil", rig, [folder])
    document = _environment(board, made.image, disk, seed, agent)
    write_atomic(file, yaml.safe_dump(document, sort_keys=False).encode())
    return Place(file, rig, (disk, seed))


def _log(file: Path) -> list[str]:
    """Its console, which writes a file. The serial port, which labgrid has, stays silent until somebody starts a getty

    there: QEMU stands still once 300 bytes have come out of it that nobody reads.
    """
    return ["-chardev", f"file,id=log,path={file}", "-device", "virtconsole,chardev=log"]


def _environment(board: EmulatedBoard, image: Image, disk: Path, seed: Path, agent: Path) -> dict[str, Any]:
    qemu = {
        "qemu_bin": "qemu",
        "machine": MACHINE,
        "cpu": CPU,
        "memory": f"{board.memory_mib}M",
        "kernel": "kernel",
        "disk": "disk",
        "disk_opts": "cache=unsafe",
        "boot_args": f"{BOOT} console=hvc0",
        "extra_args": shlex.join([*peripherals(image, [seed], agent), *_log(agent.with_name(CONSOLE))]),
    }
    return {
        "targets": {
            "main": {
                "features": ["emulated"],
                "drivers": [
                    {"QEMUDriver": qemu},
                    {"GuestAgentDriver": {"socket": str(agent)}},
                    {"FleetuneStrategy": {}},
                ],
            }
        },
        "features": ["emulated"],
        "options": {DEVICE_OPTION: board.name, TTY_OPTION: "ttyAMA0"},
        "tools": {"qemu": find_program("qemu-system-aarch64", "qemu-system-arm")},
        "images": {"kernel": str(image.kernel.resolve()), "disk": os.fspath(disk.resolve())},
        "imports": [MODULE, "fleetune.tools.hil.drivers"],
    }
