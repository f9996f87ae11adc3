"""Seeds: what makes a board that was flashed with the fleet's one image itself. Each is for one board alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetune.edge.protocol.errors import ConfigError, EnrolmentError
from fleetune.edge.protocol.files import FolderLock, read_bytes
from fleetune.edge.protocol.identity.enrolment import MAX_TOKEN, Token
from fleetune.edge.protocol.identity.folder import write_private
from fleetune.profiles.fleet import Fleet, FleetDevice, fleet_files
from fleetune.server.authority.authority import Authority
from fleetune.server.authority.ledger import TokenRow
from fleetune.tools.firstboot.seed import LABEL, RELEASES_FILE, SEED_FILE, SOON_S, TOKEN_FILE, Seed, write_seed
from fleetune.tools.places import SEED
from fleetune.tools.programs import find_program, run_program
from fleetune.tools.staging import staged
from fleetune.tools.trees import EPOCH

Form = Literal["image", "folder", "rootfs"]
State = Literal["new", "kept", "used"]

_SECTORS = 2048
"""Of an image, each of 512 bytes: 1 MiB, where a seed has some kilobytes."""

_IMAGE = _SECTORS * 512


@dataclass(frozen=True)
class Order:
    """What seeds are made of.

    Attributes:
        fleet: All devices of the fleet.
        pack: Where the pack is on a board.
        data: Where a board's samples are, once there are some.
        hours: Life of a token.
        form: ``image``: a FAT file system with the label `LABEL`, for a partition or a USB stick; ``folder``: the same
            files in a folder; ``rootfs``: a folder to copy over the root file system in the image of one board.
        releases: Address of the fleet's releases, and their root metadata, if there are some.
        renew: Whether devices get a new token, whatever became of theirs.
    """

    fleet: Fleet
    pack: str
    data: str
    hours: float
    form: Form
    releases: tuple[str, bytes] | None = None
    renew: bool = False


@dataclass(frozen=True)
class Seeded:
    """What was done for one device.

    Attributes:
        device: Its id.
        serial: Of its board, where the fleet file names it.
        path: The seed.
        state: ``new``; ``kept``: its token still waits; ``used``: the device has enrolled with it.
        expires: Unix time until which the token counts.
        ended: Whether a token that still waited, in another seed, counts no more for it.
    """

    device: str
    serial: str | None
    path: Path
    state: State
    expires: float
    ended: bool = False


def make_seeds(
    order: Order, devices: Iterable[FleetDevice], authority: Authority, out: Path, done: Callable[[Seeded], None]
) -> None:
    """Make the seeds that are not there yet; what is there and still right stays as it is.

    Args:
        order: What they are made of.
        devices: For which.
        authority: Of the fleet.
        out: Folder of the seeds, for its owner alone. It holds secrets.
        done: Called after each.

    Raises:
        ConfigError: The authority is another fleet's, its root has expired, or a program is missing.
        RunFolderError: Another process makes seeds there.
    """
    if order.fleet.name != authority.fleet:
        raise ConfigError(
            f"the inventory is of the fleet {order.fleet.name}, the authority of {authority.fleet}",
            "name the inventory and the --authority of one fleet",
        )
    if authority.ends < authority.now() + order.hours * 3600:
        raise ConfigError(
            "the root certificate of the authority has expired, or will do so before the tokens",
            "make another: `fleetune fleet rotate authority`",
        )
    if order.form == "image":
        find_program("mformat", "mtools, or take --form folder")
    with closing(FolderLock(out, remedy="wait until that one is done")):
        out.chmod(0o700)
        tokens = {row.id: row for row in authority.ledger.tokens()}
        for device in devices:
            done(_make(order, device, authority, tokens, out))


def _make(order: Order, device: FleetDevice, authority: Authority, rows: Mapping[str, TokenRow], out: Path) -> Seeded:
    folder = out / device.id
    token, used = (None, False) if order.renew else _held(folder / TOKEN_FILE, authority, rows)
    state: State = "new" if token is None else "used" if used else "kept"
    ended = False
    if token is None:
        waits = [row for row in rows.values() if row.device == device.id and row.used is None]
        ended = any(row.expires > authority.now() for row in waits)
        token = authority.make_token(device.id, order.hours)
    url, root = order.releases or (None, b"")
    seed = Seed(1, order.fleet.name, device.id, authority.site.broker, order.pack, order.data, url, device.serial)
    files = fleet_files(Fleet(order.fleet.name, (device,)))
    files |= {SEED_FILE: write_seed(seed), TOKEN_FILE: f"{token.text}\n".encode()}
    files |= {RELEASES_FILE: root} if root else {}
    _write(folder, files)
    path = folder
    if order.form == "image":
        path = out / f"{device.id}.img"
        _write(out, {path.name: _image(device.id, folder, files, out)})
    elif order.form == "rootfs":
        path = out / f"{device.serial or device.id}.rootfs"
        _write(path / SEED, files)
    return Seeded(device.id, device.serial, path, state, token.expires, ended)


def _held(file: Path, authority: Authority, rows: Mapping[str, TokenRow]) -> tuple[Token | None, bool]:
    """The token of an earlier run, unless it counts no more, and whether it was used."""
    try:
        token = Token.parse(read_bytes(file, MAX_TOKEN).decode("ascii", "replace"))
    except (FileNotFoundError, EnrolmentError):  # what cannot be read is made anew
        return None, False
    row = rows.get(token.id)
    if row is None or token.broker != authority.site.enrolment:
        return None, False
    counts = row.used is not None or token.expires > authority.now() + SOON_S
    return token if counts else None, row.used is not None


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what differs, readable by its owner alone."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, content in files.items():
        file = folder / name
        if not (file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content):
            write_private(file, content)


def _image(device: str, folder: Path, files: Mapping[str, bytes], out: Path) -> bytes:
    """A FAT file system; the same files are the same bytes."""
    environment = {"SOURCE_DATE_EPOCH": str(EPOCH)}
    number = f"{zlib.crc32(device.encode()):08x}"
    with staged(out) as scratch:
        image = str(scratch / "seed.img")
        for command in (
            ["mformat", "-C", "-i", image, "-T", str(_SECTORS), "-v", LABEL, "-N", number, "::"],
            ["mcopy", "-i", image, *(str(folder / name) for name in sorted(files)), "::"],
        ):
            run_program(command, f"the image for {device} is not there: see what it says", env=environment)
        return read_bytes(Path(image), _IMAGE)
