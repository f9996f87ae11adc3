"""SD cards: written with ``bmaptool``, read back whole, and given their seed, without being mounted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree  # a block map has no more than its size, which is checked

from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.edge.protocol.files import read_bytes
from fleetune.tools.ext4 import put_files
from fleetune.tools.firstboot.seed import seed_files
from fleetune.tools.flash.station.bsp import L4T_RELEASE
from fleetune.tools.flash.station.seeds import check_seed
from fleetune.tools.places import SEED
from fleetune.tools.programs import find_program, run_program

_MAX_MAP = 64 << 20
_PIECE = 1 << 20
_COMPRESSED = (".bz2", ".gz", ".lz4", ".lzo", ".xz", ".zip", ".zst")
_WRITING = "see what it says: a block map of another image, a full disk, or a card that cannot be written"
_ROOT = "APP"
"""What NVIDIA calls the partition with the root file system."""


@dataclass(frozen=True)
class BlockMap:
    """What of an image is data, and what it has to be.

    Attributes:
        size: Of the image in bytes.
        ranges: First byte, byte after the last, and SHA-256 of each part with data.
    """

    size: int
    ranges: tuple[tuple[int, int, str], ...]


def write_card(image: Path, card: Path, seed: Path | None, say: Callable[[str], None]) -> None:
    """Write an image to a card, see that it is there, and put the seed into it.

    Args:
        image: Raw, or compressed with its block map (``.bmap``) beside it.
        card: A device, or a file that stands for one.
        seed: Folder of the seed, if it gets one.
        say: Called with what is done next.

    Raises:
        ConfigError: The card is mounted or too small, or a program is missing.
        RunFailedError: It cannot be written, or does not keep what is written.
    """
    check_card(card)
    if seed is not None:
        check_seed(seed)
    program = find_program("bmaptool", "bmap-tools")
    with tempfile.TemporaryDirectory() as scratch, _held(card):
        check_room(image, card)
        described = block_map_of(image)
        if described is None:
            described = Path(scratch, "image.bmap")
            run_program([program, "create", "--output", described, image], f"see that {image} is a raw image")
        blocks = read_map(described)
        say(f"{card}: writing {image}")
        run_program([program, "copy", "--bmap", described, image, card], _WRITING)
        say(f"{card}: reading it back")
        read_back(blocks, card)
    if seed is not None:
        say(f"{card}: its seed")
        put_files(card, {f"/{SEED}/{name}": seed / name for name in seed_files(seed)}, offset=root_offset(card))


def check_card(card: Path, mounts: Path = Path("/proc/self/mounts")) -> None:
    """See that a card may be written.

    Raises:
        ConfigError: It is not there, is neither device nor file, or is mounted.
    """
    if not card.exists():
        raise ConfigError(f"{card} is not there", "put the card into its reader; `lsblk` shows what it is called")
    if not (stat.S_ISBLK(card.stat().st_mode) or card.is_file()):
        raise ConfigError(f"{card} is neither a device nor a file", "`lsblk` shows what the card is called")
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        device, place = line.split(" ", 2)[:2]
        if device.startswith(str(card.resolve())):
            raise ConfigError(f"{card} is mounted at {place}", f"see that it is the right one, then: umount {device}")


def check_room(image: Path, card: Path) -> None:
    """See that an image fits a card, and is not the card itself.

    Raises:
        ConfigError: It does not, or is compressed without a block map.
    """
    if card.samefile(image):
        raise ConfigError(f"{card} is the image itself", "name the card, which `lsblk` shows")
    described = block_map_of(image)
    if described is None and image.suffix in _COMPRESSED:
        raise ConfigError(
            f"{image} is compressed, and has no block map", f"name the raw image, or get {image.name}.bmap"
        )
    needed, room = image.stat().st_size if described is None else read_map(described).size, _size(card)
    if room < needed:
        raise ConfigError(f"{card} has {room >> 20} MiB, {image} needs {-(-needed >> 20)}", "use a larger card")


def block_map_of(image: Path) -> Path | None:
    """The block map beside an image, if there is one."""
    maps = (image.with_name(f"{image.name}.bmap"), image.with_suffix(".bmap"))
    return next((file for file in maps if file.is_file()), None)


def release_of(image: Path) -> int | None:
    """Major release of L4T in a raw image; None where it does not tell."""
    if image.suffix in _COMPRESSED:
        return None
    place = f"{image}?offset={root_offset(image)}"
    said = run_program(
        [find_program("debugfs", "e2fsprogs"), "-R", "cat /etc/nv_tegra_release", place],
        "see what it says",
        fine=(0, 1),
    )
    found = L4T_RELEASE.match(said.encode())
    return int(found[1]) if found else None


@contextmanager
def _held(card: Path) -> Iterator[None]:
    """Keeps others from writing to the same card."""
    with card.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFailedError(f"{card} is being written already", "wait until that is over") from error
        yield


def read_map(file: Path) -> BlockMap:
    """Read a block map, version 2.

    Raises:
        ConfigError: It is none, or without checksums.
    """
    try:
        root = ElementTree.fromstring(read_bytes(file, _MAX_MAP))  # noqa: S314
        size, block = (int(root.findtext(name, "")) for name in ("ImageSize", "BlockSize"))
        ranges = []
        kind = root.findtext("ChecksumType", "").strip()
        for entry in root.iterfind("BlockMap/Range"):
            first, _, last = (entry.text or "").strip().partition("-")
            end = min((int(last or first) + 1) * block, size)
            ranges.append((int(first) * block, end, entry.attrib["chksum"]))
    except (ElementTree.ParseError, ValueError, KeyError) as error:
        raise ConfigError(f"{file}: no block map: {error}", "make it anew: bmaptool create") from error
    if kind != "sha256" or not ranges:
        raise ConfigError(f"{file} has no SHA-256 of its ranges", "make it anew: bmaptool create")
    return BlockMap(size, tuple(ranges))


def read_back(blocks: BlockMap, card: Path) -> None:
    """See that a card keeps what was written: from the card itself, not from what the kernel still has in memory.

    Raises:
        RunFailedError: It does not.
    """
    with card.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for first, end, expected in blocks.ranges:
            stream.seek(first)
            digest, left = hashlib.sha256(), end - first
            while left:
                piece = stream.read(min(left, _PIECE))
                if not piece:
                    break
                digest.update(piece)
                left -= len(piece)
            if digest.hexdigest() != expected:
                raise RunFailedError(
                    f"{card} does not keep what is written: bytes {first} to {end} are others", "use another card"
                )


def root_offset(card: Path) -> int:
    """Where the root file system begins: the partition called APP, else the largest; 0 without partitions.

    Raises:
        ConfigError: ``sfdisk`` is missing.
    """
    program = find_program("sfdisk", "fdisk")
    said = run_program([program, "--json", card], "see what it says", fine=(0, 1))
    if not said:
        return 0
    table = json.loads(said)["partitiontable"]
    partitions = table.get("partitions", [])
    if not partitions:
        return 0
    named = [one for one in partitions if one.get("name") == _ROOT]
    chosen = named[0] if named else max(partitions, key=lambda one: int(one["size"]))
    return int(chosen["start"]) * int(table.get("sectorsize", 512))


def _size(card: Path) -> int:
    with card.open("rb") as stream:
        return stream.seek(0, os.SEEK_END)
