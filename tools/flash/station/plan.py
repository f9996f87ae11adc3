"""Which board is flashed how: the commands, as they are printed and as they are run."""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import file_sha256
from fleetune.profiles.fleet import FleetDevice
from fleetune.tools.flash.station.boards import Found
from fleetune.tools.flash.station.bsp import FLASH, INITRD_FLASH, Bsp, read_bsp
from fleetune.tools.flash.station.ledger import Entry, state_of
from fleetune.tools.flash.station.seeds import check_seed
from fleetune.tools.places import SEED

Way = Literal["card", "usb", "initrd"]
WAYS: tuple[Way, ...] = ("card", "usb", "initrd")

NETWORK = "usb0"
"""What NVIDIA's program calls the network interface that a board in recovery mode becomes."""

Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One board.

    Attributes:
        device: Which device it becomes.
        where: The USB port, or the card.
        image: SHA-256 of what it is flashed with, its seed too.
        commands: What is run for it, in order, up to the first that fails.
        after: What is run in the end, whatever became of those.
    """

    device: FleetDevice
    where: str
    image: str
    commands: tuple[Command, ...]
    after: tuple[Command, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All boards of a run.

    Attributes:
        way: ``card``: SD cards, each in a reader of its own, side by side; ``usb``: ``flash.sh``, one board after the
            other, since it works in one folder; ``initrd``: ``l4t_initrd_flash.sh``, all boards at once.
        image: SHA-256 of what they are flashed with.
        jobs: The boards.
        at_once: How many are worked on at a time.
        shared: The command that serves all of them at once, where one does.
        bsp: NVIDIA's package, unless cards are written.
        source: The image that is written to cards.
        board: Name of the board's configuration in the package.
        found: What is connected in recovery mode.
        erase: Whether everything on the boards is erased first.
        seeded: Whether boards get their seeds with it.
    """

    way: Way
    image: str
    jobs: tuple[Job, ...]
    at_once: int = 1
    shared: Command = ()
    bsp: Bsp | None = None
    source: Path | None = None
    board: str = ""
    found: tuple[Found, ...] = ()
    erase: bool = False
    seeded: bool = False


@dataclass(frozen=True)
class Wanted:
    """What the operator asks for.

    Attributes:
        way: See `Plan`.
        devices: Of the inventory.
        at: Where → device id, as far as it was said.
        seeds: Folder of the seeds; None for none.
        image: For cards.
        bsp: For NVIDIA's programs.
        board: Name of the board's configuration there.
        storage: What is flashed, such as ``mmcblk0p1``.
        erase: Whether everything on the board is erased first, its boot slots too.
    """

    way: Way
    devices: tuple[FleetDevice, ...]
    at: Mapping[str, str]
    seeds: Path | None
    image: Path | None = None
    bsp: Path | None = None
    board: str = ""
    storage: str = "mmcblk0p1"
    erase: bool = False


def make_plan(wanted: Wanted, found: Iterable[Found], entries: Iterable[Entry] = ()) -> Plan:
    """Say which board becomes which device, and how.

    Args:
        wanted: What the operator asks for.
        found: What is connected in recovery mode.
        entries: Of the ledger: a board that is done has left recovery mode, and is missed no more.

    Raises:
        ConfigError: Something is not said, a device is not in the inventory, or a board cannot be told.
    """
    if wanted.way == "card":
        return _card_plan(wanted)
    if wanted.bsp is None or not wanted.board:
        raise ConfigError(f"--way {wanted.way} needs --bsp and --board", "name Linux_for_Tegra, and a board it knows")
    if wanted.storage.startswith("-") or (wanted.erase and wanted.way == "usb"):
        option = "--erase" if wanted.erase else f"--storage {wanted.storage}"
        raise ConfigError(f"{option} is nothing for --way {wanted.way}", "leave it out")
    if wanted.seeds is not None and wanted.way == "initrd":
        raise ConfigError(
            "--seeds: boards that are flashed all at once get one image",
            "leave it out, and bring each its seed on a stick",
        )
    bsp, connected = read_bsp(wanted.bsp.resolve()), tuple(found)
    places = _places(wanted, connected, bsp.image, list(entries))
    if wanted.way == "usb":
        jobs = tuple(_usb_job(wanted, bsp, device, where) for where, device in places.items())
        return Plan("usb", bsp.image, jobs, bsp=bsp, board=wanted.board, found=connected)
    one = len(places) == 1
    program = (str(bsp.path / INITRD_FLASH), "--flash-only", "--network", NETWORK)
    which = ("--usb-instance", next(iter(places))) if one else ("--massflash", str(len(places)))
    erase = ("--erase-all",) if wanted.erase else ()
    command: Command = (*program, *which, *erase, wanted.board, wanted.storage)
    jobs = tuple(Job(device, where, bsp.image, (command,) if one else ()) for where, device in places.items())
    shared = () if one else command
    return Plan(
        "initrd", bsp.image, jobs, shared=shared, bsp=bsp, board=wanted.board, found=connected, erase=wanted.erase
    )


def _card_plan(wanted: Wanted) -> Plan:
    if wanted.image is None or not wanted.image.is_file():
        raise ConfigError(f"--image: {wanted.image or 'it is missing'}: no such file", "name the image for the cards")
    jobs, image, cards = [], file_sha256(wanted.image), dict[str, str]()
    for where, device in _named(wanted).items():
        card = _card_itself(Path(where))
        if card in cards:
            raise ConfigError(f"--at: {where} and {cards[card]} are one card", "name each card once")
        cards[card] = where
        command = [sys.executable, "-m", "fleetune.tools.cli", "flash", "card", str(wanted.image), where]
        if wanted.seeds is not None:
            command += ["--seed", str((wanted.seeds / device.id).resolve())]
        jobs.append(Job(device, where, _image(image, wanted.seeds, device), (tuple(command),)))
    if not jobs:
        raise ConfigError("no card is named", "say which card is for which device: --at /dev/sdb=nano-1")
    return Plan("card", image, tuple(jobs), at_once=len(jobs), source=wanted.image, seeded=wanted.seeds is not None)


def _usb_job(wanted: Wanted, bsp: Bsp, device: FleetDevice, where: str) -> Job:
    """A seed lies in the rootfs for this one board alone: none before it, and none after."""
    flash: Command = (str(bsp.path / FLASH), "--usb-instance", where, wanted.board, wanted.storage)
    place = bsp.rootfs / SEED
    clear = ("rm", "--recursive", "--force", str(place))
    put: tuple[Command, ...] = ()
    if wanted.seeds is not None:
        seed = str((wanted.seeds / device.id).resolve())
        put = (
            ("mkdir", "--parents", str(place.parent)),
            ("cp", "--recursive", "--no-target-directory", seed, str(place)),
        )
    return Job(device, where, _image(bsp.image, wanted.seeds, device), (clear, *put, flash), after=(clear,))


def _image(image: str, seeds: Path | None, device: FleetDevice) -> str:
    """What a board is flashed with, its seed too."""
    seed = "" if seeds is None else check_seed((seeds / device.id).resolve(), device)
    return hashlib.sha256(f"{image} {seed}".encode()).hexdigest() if seed else image


def _card_itself(card: Path) -> str:
    """The same for all names of one card."""
    try:
        status = card.stat()
    except OSError:  # the preflight says what is wrong with it
        return str(card)
    return f"device {status.st_rdev}" if stat.S_ISBLK(status.st_mode) else f"file {status.st_dev} {status.st_ino}"


def _named(wanted: Wanted) -> dict[str, FleetDevice]:
    """Where → device, as the operator said it."""
    known = {device.id: device for device in wanted.devices}
    named = dict[str, FleetDevice]()
    for where, device in wanted.at.items():
        if device not in known:
            raise ConfigError(f"--at: {device} is not in the inventory", f"choose from {', '.join(sorted(known))}")
        if known[device] in named.values():
            raise ConfigError(f"--at: {device} is there twice", "a device is one board")
        named[where] = known[device]
    return named


def _places(wanted: Wanted, connected: tuple[Found, ...], image: str, entries: list[Entry]) -> dict[str, FleetDevice]:
    """Port → device: as it was said, else by the serial number that the board tells."""
    named, serials = _named(wanted), {device.serial.lower(): device for device in wanted.devices if device.serial}
    ports = {board.port for board in connected}
    left = {port for port in named.keys() - ports if _is_done(wanted, named[port], image, entries)}
    if strange := sorted(named.keys() - ports - left):
        raise ConfigError(
            f"--at: no board in recovery mode at {', '.join(strange)}",
            f"there is one at {', '.join(sorted(ports)) or 'no port'}; see docs/flashing.md for the button to hold",
        )
    places = {port: named[port] for port in sorted(left)}
    for board in connected:
        device = named.get(board.port) or serials.get(board.serial)
        if device is None and named and wanted.way == "usb":
            continue  # the operator has said which boards are meant
        if device is None:
            number = f"serial number {board.serial}" if board.serial else "which tells no serial number"
            raise ConfigError(
                f"the board at USB port {board.port}, {number}, is nobody's",
                f"say whose it is: --at {board.port}=DEVICE; or unplug it",
            )
        if device in places.values():
            raise ConfigError(f"two boards would become {device.id}", "say which it is with --at, unplug the other")
        places[board.port] = device
    if not places:
        raise ConfigError("no board in recovery mode is connected", "see docs/flashing.md for the button to hold")
    return places


def _is_done(wanted: Wanted, device: FleetDevice, image: str, entries: list[Entry]) -> bool:
    return wanted.way == "usb" and state_of(entries, device.id, _image(image, wanted.seeds, device)) == "done"
