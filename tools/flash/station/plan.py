"""Which board is flashed how: the commands, as they are printed and as they are run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import file_sha256
from fleetune.profiles.fleet import FleetDevice
from fleetune.tools.firstboot.board import STATE
from fleetune.tools.flash.station.boards import Found
from fleetune.tools.flash.station.bsp import FLASH, INITRD_FLASH, Bsp, read_bsp

Way = Literal["card", "usb", "initrd"]
WAYS: tuple[Way, ...] = ("card", "usb", "initrd")

SEED = STATE / "seed"
NETWORK = "usb0"
"""What NVIDIA's program calls the network interface that a board in recovery mode becomes."""

Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One board.

    Attributes:
        device: Which device it becomes.
        where: The USB port, or the card.
        commands: What is run for it, in order, up to the first that fails.
        after: What is run in the end, whatever became of those.
    """

    device: FleetDevice
    where: str
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


def make_plan(wanted: Wanted, found: Iterable[Found]) -> Plan:
    """Say which board becomes which device, and how.

    Raises:
        ConfigError: Something is not said, a device is not in the inventory, or a board cannot be told.
    """
    if wanted.way == "card":
        return _card_plan(wanted)
    if wanted.bsp is None or not wanted.board:
        raise ConfigError(f"--way {wanted.way} needs --bsp and --board", "name Linux_for_Tegra, and a board it knows")
    bsp, connected = read_bsp(wanted.bsp.resolve()), tuple(found)
    places = _places(wanted, connected)
    if wanted.way == "usb":
        jobs = tuple(_usb_job(wanted, bsp, device, where) for where, device in places.items())
        return Plan("usb", bsp.image, jobs, bsp=bsp, board=wanted.board, found=connected)
    one = len(places) == 1
    program = (str(bsp.path / INITRD_FLASH), "--flash-only", "--network", NETWORK)
    which = ("--usb-instance", next(iter(places))) if one else ("--massflash", str(len(places)))
    erase = ("--erase-all",) if wanted.erase else ()
    command: Command = (*program, *which, *erase, wanted.board, wanted.storage)
    jobs = tuple(Job(device, where, (command,) if one else ()) for where, device in places.items())
    shared = () if one else command
    return Plan(
        "initrd", bsp.image, jobs, shared=shared, bsp=bsp, board=wanted.board, found=connected, erase=wanted.erase
    )


def _card_plan(wanted: Wanted) -> Plan:
    if wanted.image is None or not wanted.image.is_file():
        raise ConfigError(f"--image: {wanted.image or 'it is missing'}: no such file", "name the image for the cards")
    jobs = []
    for where, device in _named(wanted).items():
        command = [sys.executable, "-m", "fleetune.tools.cli", "flash", "card", str(wanted.image), where]
        if wanted.seeds is not None:
            command += ["--seed", str(_seed(wanted.seeds, device))]
        jobs.append(Job(device, where, (tuple(command),)))
    if not jobs:
        raise ConfigError("no card is named", "say which card is for which device: --at /dev/sdb=nano-1")
    return Plan("card", file_sha256(wanted.image), tuple(jobs), at_once=len(jobs), source=wanted.image)


def _usb_job(wanted: Wanted, bsp: Bsp, device: FleetDevice, where: str) -> Job:
    """A seed lies in the rootfs for this one board alone, and is out of it before the next."""
    flash: Command = (str(bsp.path / FLASH), "--usb-instance", where, wanted.board, wanted.storage)
    if wanted.seeds is None:
        return Job(device, where, (flash,))
    place = bsp.rootfs / SEED
    copy = ("cp", "--recursive", "--no-target-directory", str(_seed(wanted.seeds, device)), str(place))
    clear = ("rm", "--recursive", "--force", str(place))
    return Job(device, where, (clear, ("mkdir", "--parents", str(place.parent)), copy, flash), after=(clear,))


def _seed(seeds: Path, device: FleetDevice) -> Path:
    folder = (seeds / device.id).resolve()
    if not folder.is_dir():
        raise ConfigError(f"{device.id} has no seed: {folder} is missing", "make it: `fleetune flash seed`")
    return folder


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


def _places(wanted: Wanted, connected: tuple[Found, ...]) -> dict[str, FleetDevice]:
    """Port → device: as it was said, else by the serial number that the board tells."""
    named, serials = _named(wanted), {device.serial.lower(): device for device in wanted.devices if device.serial}
    ports = {board.port for board in connected}
    if strange := sorted(named.keys() - ports):
        raise ConfigError(
            f"--at: no board in recovery mode at {', '.join(strange)}",
            f"there is one at {', '.join(sorted(ports)) or 'no port'}; see docs/flashing.md for the button to hold",
        )
    places = dict[str, FleetDevice]()
    for board in connected:
        device = named.get(board.port) or serials.get(board.serial)
        if device is None:
            number = f"serial number {board.serial}" if board.serial else "which tells no serial number"
            raise ConfigError(
                f"the board at USB port {board.port}, {number}, is nobody's",
                f"say whose it is: --at {board.port}=DEVICE",
            )
        if device in places.values():
            raise ConfigError(f"two boards would become {device.id}", "say which it is with --at, unplug the other")
        places[board.port] = device
    if not places:
        raise ConfigError("no board in recovery mode is connected", "see docs/flashing.md for the button to hold")
    return places
