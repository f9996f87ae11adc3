"""What an emulated board starts from: its pack, its samples, its package and its image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.pack.pack import Pack
from fleetune.profiles.fleet import read_fleet
from fleetune.tools.demo.task import Task
from fleetune.tools.emulator.image import Image, make_image
from fleetune.tools.emulator.machine import HOST, make_disk
from fleetune.tools.emulator.toy import write_toy_pack
from fleetune.tools.flash.build import build
from fleetune.tools.flash.record import read_record
from fleetune.tools.flash.tier import find_tier
from fleetune.tools.rig import equipment, make_rig, make_rig_seeds

TIER = "t4"

_INVENTORY = """\
schema: 1
fleet: {fleet}
devices:
  - {{id: {board.name}, profile: {board.profile}, budget: {{memory: {board.budget_mib}MiB}}}}
"""


@dataclass(frozen=True)
class EmulatedBoard:
    """A board that is emulated.

    Attributes:
        name: Its id in its fleet.
        profile: What it stands for.
        memory_mib: Its memory.
        budget_mib: What its agent may have of it.
    """

    name: str
    profile: str = "jetson-nano-2gb"
    memory_mib: int = 2048
    budget_mib: int = 192


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


def flash_board(board: EmulatedBoard, made: BoardImage, fleet: str, rig: Path, folder: Path) -> tuple[Path, Path]:
    """Make a fleet of one board, and flash that.

    Args:
        board: Which.
        made: What it starts from.
        fleet: Name of its fleet.
        rig: For the fleet's own side.
        folder: For its disk.

    Returns:
        Its disk, with samples and the signature of the fleet's publisher; and its seed.

    Raises:
        ConfigError: A program is missing.
    """
    inventory = folder / "inventory.yaml"
    inventory.write_text(_INVENTORY.format(fleet=fleet, board=board), encoding="utf-8")
    make_rig(rig, read_fleet(inventory), made.pack, made.samples, HOST)
    (seed,) = make_rig_seeds(rig)
    return make_disk(made.image, folder, equipment(rig)), seed.path
