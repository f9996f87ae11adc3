"""What an emulated board starts from: its pack, its samples, its package and its image."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import RunFolderError
from fleetune.edge.resources.limits import Budget
from fleetune.profiles.fleet import PROFILE_ENDING, Fleet, FleetDevice
from fleetune.profiles.profile import read_profile
from fleetune.tools.demo.task import Task
from fleetune.tools.emulator.image import Image, make_image
from fleetune.tools.emulator.machine import HOST, make_disk
from fleetune.tools.emulator.toy import write_toy_pack
from fleetune.tools.flash.build import build
from fleetune.tools.flash.record import read_record
from fleetune.tools.flash.tier import find_tier
from fleetune.tools.rig import equipment, make_rig, make_rig_seeds
from fleetune.tools.trees import SHORT

TIER = "t4"


@dataclass(frozen=True)
class EmulatedBoard:
    """A board that is emulated.

    Attributes:
        name: Its id in its fleet.
        profile: What it stands for: a profile's name, or its file.
        memory_mib: Its memory.
        budget_mib: What its agent may have of it.
        budget_cpu_s: CPU seconds that its agent may take for a round.
    """

    name: str
    profile: str = "jetson-nano-2gb"
    memory_mib: int = 2048
    budget_mib: float = 192
    budget_cpu_s: float = math.inf

    @property
    def device(self) -> FleetDevice:
        """The same, as one of a fleet.

        Raises:
            ConfigError: There is no such profile.
        """
        return FleetDevice(self.name, read_profile(self.profile), Budget(self.budget_mib, self.budget_cpu_s))


@dataclass(frozen=True)
class BoardImage:
    """All of it.

    Attributes:
        image: What boots.
        pack: The pack in it.
        samples: Of two classes, JSON lines.
        record: Of the build that is in the image.
    """

    image: Image
    pack: Path
    samples: Path
    record: Path


def make_board_image(images: Path, pack: Path | None, samples: Path | None, say: Callable[[str], None]) -> BoardImage:
    """Make it; what is there already stays.

    Args:
        images: Folder for all of it.
        pack: The pack; None for a toy.
        samples: What the board trains on; None for reviews of films.
        say: Called with what is done next.

    Raises:
        ConfigError: A program, or the extra that it needs, is missing.
        PackError: The pack is damaged.
        RunFailedError: The image cannot be made.
    """
    images.mkdir(parents=True, exist_ok=True)
    if pack is None:
        pack = images / "toy"
        if not pack.is_dir():
            say("the pack")
            write_toy_pack(pack)
    if samples is None:
        samples = images / "samples.jsonl"
        Task("text", None, train=64, val=32, test=32, seed=0).write_data([samples])
    Pack.open(pack)
    record = build(find_tier(TIER), images, packs=[pack], say=say)
    (deb,) = (images / name for name in read_record(record).files if name.endswith(".deb"))
    return BoardImage(make_image(deb, images, say), pack, samples, record)


def clear_folder(out: Path, *marks: str) -> None:
    """Make a folder for boards. What an earlier run left there goes, with boards that still run as it was killed.

    Args:
        out: The folder.
        marks: Folders in it; a folder that has things in it, but none of these, is not ours.

    Raises:
        RunFolderError: The folder has something else in it.
    """
    if out.exists():
        if any(out.iterdir()) and not any((out / mark).is_dir() for mark in marks):
            raise RunFolderError(f"--out: {out} is not empty, and no emulated board's", "name another folder")
        disks = f"file={out.resolve()}/"
        for process in psutil.process_iter(["cmdline"]):
            if any(part.startswith(disks) for word in process.info["cmdline"] or () for part in word.split(",")):
                process.kill()
        shutil.rmtree(out)
    out.mkdir(parents=True)


def measured_file(board: EmulatedBoard, made: BoardImage) -> Path:
    """Where, among the images, the profile is kept that boards of this kind have measured, with this kit and pack."""
    kit, pack = read_record(made.record).kit, Pack.open(made.pack).sha256[:SHORT]
    return made.record.parent / f"{board.profile}_{board.memory_mib}_{kit}_{pack}{PROFILE_ENDING}"


def flash_boards(
    boards: Sequence[EmulatedBoard], made: BoardImage, fleet: str, rig: Path, folders: Sequence[Path], host: str = HOST
) -> list[tuple[Path, Path]]:
    """Make a fleet, and flash its boards.

    Args:
        boards: Which.
        made: What they start from.
        fleet: Name of their fleet.
        rig: For the fleet's own side.
        folders: For the disk of each.
        host: How they reach this machine.

    Returns:
        Of each board its disk, with samples and the signature of the fleet's publisher; and its seed.

    Raises:
        ConfigError: A program is missing, or a board cannot have its budget.
    """
    make_rig(rig, Fleet(fleet, tuple(board.device for board in boards)), made.pack, made.samples, host)
    seeds, files = make_rig_seeds(rig), equipment(rig)
    return [(make_disk(made.image, folder, files), seed.path) for folder, seed in zip(folders, seeds, strict=True)]
