"""What an emulated board starts from: its pack, its samples, its package and its image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.pack.pack import Pack
from fleetune.tools.demo.task import Task
from fleetune.tools.emulator.image import Image, make_image
from fleetune.tools.emulator.toy import write_toy_pack
from fleetune.tools.flash.build import MAINTAINER, build
from fleetune.tools.flash.record import ENDING
from fleetune.tools.flash.tier import find_tier

TIER = "t4"


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
    hashes = build(find_tier(TIER), images, packs=[pack], maintainer=MAINTAINER, say=say)
    (deb,) = (images / name for name in hashes if name.endswith(".deb"))
    return BoardImage(
        make_image(deb, images, say), pack, samples, deb.with_name(deb.name.removesuffix(".deb") + ENDING)
    )
