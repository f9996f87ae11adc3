"""What is known to go wrong when boards are flashed, looked for before any board is touched. Each has its remedy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError
from fleetune.profiles.profile import profile_names
from fleetune.tools.doctor.host import Check
from fleetune.tools.flash.station.boards import MODULES, Found
from fleetune.tools.flash.station.bsp import FLASH, INITRD_FLASH, TIERS, Bsp
from fleetune.tools.flash.station.card import check_card, check_room, release_of
from fleetune.tools.flash.station.plan import NETWORK, Job, Plan
from fleetune.tools.places import SEED

PREFLIGHT = 47
"""Exit code; docs/exit-codes.md has all."""

_NO_EXPORT = {
    "zfs": "the kernel's NFS server does not export ZFS as these programs ask for it",
    "overlay": "an overlay file system cannot be exported",
    "fuseblk": "a file system in user space cannot be exported",
    "ecryptfs": "an encrypted folder cannot be exported",
    "9p": "a folder of a virtual machine's host cannot be exported",
}
_NFS_UNITS = ("nfs-server.service", "nfs-kernel-server.service", "nfs-mountd.service", "rpcbind.service")
_UNITS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
_RULES = ("etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d")
_RULE = (
    'SUBSYSTEM=="net", ACTION=="add", SUBSYSTEMS=="usb", ATTRS{idVendor}=="0955", NAME="usb%n"'
    " in /etc/udev/rules.d/70-l4t-flash.rules, then: udevadm control --reload"
)
_ROOM = 3
"""What NVIDIA's programs write beside the rootfs: as many times its size, as a raw and as a sparse image."""


@dataclass(frozen=True)
class Station:
    """The machine at which boards are flashed.

    Attributes:
        root: Where its files are.
        user: Who runs this; 0 is root.
        qspi: Major release of L4T that the boards' QSPI memory holds, as far as the operator knows.
    """

    root: Path = Path("/")
    user: int = 0
    qspi: int | None = None


def preflight(plan: Plan, station: Station) -> Iterator[Check]:
    """What each check found; a run starts only where none is a failure."""
    yield _rights(plan, station)
    if plan.way == "card":
        assert plan.source is not None
        for job in plan.jobs:
            yield _card(job, plan.source)
        yield _system(plan, plan.source)
        yield _qspi(plan, station)
        if not plan.seeded:
            yield Check("seeds", "note", "the cards get none", "name them with --seeds, or bring each on a USB stick")
        return
    assert plan.bsp is not None
    yield _program(plan, plan.bsp)
    yield _release(plan, plan.bsp)
    yield _modules(plan)
    yield _content(plan, plan.bsp)
    yield _rootfs(plan, plan.bsp)
    yield _room(plan.bsp)
    if plan.way == "initrd":
        yield _export(plan.bsp, station)
        yield _nfs(station)
        yield _network(station)
        yield _slots(plan)
        yield _seeds()


def _failure(name: str, found: str, fix: str) -> Check:
    return Check(name, "failure", found, fix, PREFLIGHT)


def _rights(plan: Plan, station: Station) -> Check:
    if station.user != 0 and plan.way != "card":
        return _failure("rights", "NVIDIA's programs ask for root", "run it with sudo")
    return Check("rights", "ok", "root" if station.user == 0 else "a user's, which may do for cards")


def _card(job: Job, image: Path) -> Check:
    name = f"card of {job.device.id}"
    try:
        check_card(Path(job.where))
        check_room(image, Path(job.where))
    except ConfigError as error:
        return _failure(name, error.what, error.remedy)
    return Check(name, "ok", job.where)


def _system(plan: Plan, image: Path) -> Check:
    """What is on the cards has to be for the boards that get them."""
    release = release_of(image)
    if release is None:
        return Check(
            "image", "note", "it does not tell its release of L4T: compressed, or no system of NVIDIA's", "look"
        )
    for job in plan.jobs:
        if release not in TIERS.get(job.device.profile.tier, ()):
            return _failure(
                "image",
                f"it is R{release}; {job.device.id} (serial number {job.device.serial or 'unknown'}) is of tier "
                f"{job.device.profile.tier}",
                "name the image of those boards, and the others in a run of their own",
            )
    return Check("image", "ok", f"R{release}")


def _qspi(plan: Plan, station: Station) -> Check:
    """A card starts from what is in the board's QSPI memory, which a card does not bring along."""
    tiers = {job.device.profile.tier for job in plan.jobs} & TIERS.keys()
    if not tiers:
        return Check("qspi", "ok", "these boards have none")
    releases = sorted(set.intersection(*(set(TIERS[tier]) for tier in tiers)))
    if not releases:
        return _failure("qspi", "these boards run on different releases of L4T", "make a run for each kind of board")
    wanted = " or ".join(f"R{release}" for release in releases)
    if station.qspi is None:
        return Check(
            "qspi",
            "note",
            f"not known; a card for {wanted} starts only from a QSPI memory of {wanted}",
            f"say what it is: --qspi {releases[0]}",
        )
    if station.qspi not in releases:
        return _failure(
            "qspi",
            f"it holds R{station.qspi}, the card is for {wanted}: the board would not start",
            "flash it once over USB: --way usb (Nano) or --way initrd (Orin), with the BSP of that release",
        )
    return Check("qspi", "ok", f"R{station.qspi}")


def _program(plan: Plan, bsp: Bsp) -> Check:
    program = bsp.path / (FLASH if plan.way == "usb" else INITRD_FLASH)
    if not os.access(program, os.X_OK):
        return _failure("program", f"{program} is missing, or no program", "unpack NVIDIA's driver package anew")
    if plan.way == "initrd" and "t1" in {job.device.profile.tier for job in plan.jobs}:
        return _failure("program", "it does not flash a Jetson Nano", "take --way usb")
    if not bsp.knows(plan.board):
        known = ", ".join(bsp.boards[:20]) or "none"
        return _failure("program", f"it knows no board {plan.board!r}", f"choose from {known}")
    return Check("program", "ok", f"{program}, {plan.board}")


def _release(plan: Plan, bsp: Bsp) -> Check:
    if bsp.release is None:
        return _failure(
            "bsp", f"{bsp.rootfs} is no root file system of L4T", "unpack the sample rootfs, and run apply_binaries.sh"
        )
    release = f"R{bsp.release[0]}.{bsp.release[1]}"
    for job in plan.jobs:
        tier = job.device.profile.tier
        if bsp.release[0] not in TIERS.get(tier, ()):
            wanted = " or ".join(f"R{one}" for one in TIERS.get(tier, ())) or "none of NVIDIA's"
            return _failure(
                "bsp",
                f"it is {release}; {job.device.id} (serial number {job.device.serial or 'unknown'}) is of tier {tier}, "
                f"which runs on {wanted}",
                "name the BSP of those boards",
            )
    return Check("bsp", "ok", release)


def _modules(plan: Plan) -> Check:
    """What answers at a port has to be what the device's profile says."""
    at: dict[str, Found] = {board.port: board for board in plan.found}
    shipped = profile_names()
    for job in plan.jobs:
        if job.where not in at:  # it is done, and has left recovery mode
            continue
        module, profile = MODULES[at[job.where].product], job.device.profile
        told, serial = at[job.where].serial, job.device.serial
        if told and serial and told != serial.lower():
            return _failure(
                "boards",
                f"the board at {job.where} says that its serial number is {told}; that of {job.device.id} is {serial}",
                "correct --at, or the inventory",
            )
        fits = profile.name in module.profiles if profile.name in shipped else profile.tier in module.tiers
        if not fits:
            return _failure(
                "boards",
                f"at {job.where} is a {module.name}; {job.device.id} (serial number {job.device.serial or 'unknown'}) "
                f"has the profile {profile.name}, tier {profile.tier}",
                "plug in the board that the inventory means, or correct its profile",
            )
    return Check("boards", "ok", ", ".join(f"{job.where}: {job.device.id}" for job in plan.jobs))


def _content(plan: Plan, bsp: Bsp) -> Check:
    fix = "sudo tar -xpf fleetune_….overlay.tar.gz --numeric-owner -C Linux_for_Tegra/rootfs"
    if not bsp.kit:
        return _failure("content", f"{bsp.rootfs} has no kit of Fleetune", fix)
    for job in plan.jobs:
        if job.device.profile.tier != bsp.tier:
            return _failure(
                "content",
                f"the kit is for tier {bsp.tier}, {job.device.id} is of tier {job.device.profile.tier}",
                f"build it for that tier, and unpack it: {fix}",
            )
    return Check("content", "ok", f"kit {bsp.kit}, tier {bsp.tier}")


def _rootfs(plan: Plan, bsp: Bsp) -> Check:
    """A seed that a broken-off run left behind would make all boards one."""
    place = bsp.rootfs / SEED
    if plan.way == "initrd" and place.exists():
        return _failure("rootfs", f"{place} holds a seed, which every board would get", f"rm -r {place}")
    return Check("rootfs", "ok", "no seed of another board")


def _room(bsp: Bsp) -> Check:
    needed = _ROOM * sum(path.lstat().st_blocks for path in bsp.rootfs.rglob("*")) * 512
    free = shutil.disk_usage(bsp.path).free
    if free < needed:
        return _failure(
            "room", f"{bsp.path}: {free >> 20} MiB free, {needed >> 20} are needed for images", "make room there"
        )
    return Check("room", "ok", f"{free >> 20} MiB free, {needed >> 20} needed")


def _export(bsp: Bsp, station: Station) -> Check:
    """The board takes its files from an NFS export of the BSP's folder."""
    kind, place = "", Path("/")
    for line in (station.root / "proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mounted, this, *_ = line.split(" ")
        where = Path(mounted.replace("\\040", " "))
        if bsp.path.is_relative_to(where) and len(where.parts) >= len(place.parts):
            kind, place = this, where
    if kind in _NO_EXPORT:
        return _failure(
            "export", f"{bsp.path} lies on {kind}: {_NO_EXPORT[kind]}", "move the BSP to an ext4 file system"
        )
    return Check("export", "ok", f"{bsp.path} lies on {kind or 'a file system that is not listed'}")


def _nfs(station: Station) -> Check:
    known = [unit for unit in _NFS_UNITS if any((station.root / at / unit).is_file() for at in _UNITS[1:])]
    masked_units = [unit for unit in _NFS_UNITS if any(_is_masked(station.root / at / unit) for at in _UNITS[:2])]
    if masked_units:
        masked = " ".join(masked_units)
        return _failure("nfs", f"masked, so that they may not start: {masked}", f"systemctl unmask {masked}")
    if not {"nfs-server.service", "nfs-kernel-server.service"} & set(known):
        return _failure("nfs", "no NFS server is installed", "apt-get install nfs-kernel-server")
    return Check("nfs", "ok", ", ".join(known))


def _is_masked(unit: Path) -> bool:
    return unit.is_symlink() and str(unit.readlink()) == "/dev/null"


def _network(station: Station) -> Check:
    """The board becomes a network interface in mid-flash; NVIDIA's program waits for the name that the kernel gives."""
    rules = [file for folder in _RULES for file in sorted((station.root / folder).glob("*.rules"))]
    renames = any((station.root / "usr/lib/systemd/network").glob("*-usb-net-by-mac.link")) or any(
        file.name.endswith("-usb-net-by-mac.rules") for file in rules
    )
    ifnames = "net.ifnames=0" in (station.root / "proc/cmdline").read_text(encoding="utf-8", errors="replace").split()
    kept = any(_keeps_name(file) for file in rules)
    if renames and not ifnames and not kept:
        return _failure("network", f"udev renames {NETWORK} as it appears, and the flash waits for it in vain", _RULE)
    return Check("network", "ok", f"the board stays {NETWORK}")


def _keeps_name(rules: Path) -> bool:
    try:
        lines = rules.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any('"0955"' in line and "NAME=" in line and not line.lstrip().startswith("#") for line in lines)


def _slots(plan: Plan) -> Check:
    """A board in recovery mode does not tell; an earlier system may have left a slot that never starts."""
    if plan.erase:
        return Check("slots", "ok", "erased with everything else")
    return Check(
        "slots",
        "note",
        "boards in recovery mode do not tell: one whose slot is stuck at 0xFF takes the image, and does not start",
        "`fleetune doctor` on the board says it; --erase resets it",
    )


def _seeds() -> Check:
    return Check(
        "seeds",
        "note",
        "boards that are flashed all at once get one image",
        "bring each its seed on a USB stick: `fleetune flash seed`, docs/flashing.md",
    )
