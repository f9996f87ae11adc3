"""A bootable image for the emulated board: Debian for arm64, and the package that boards get, in one ext4 file system.

``mmdebstrap`` makes the system, verified by Debian's keys, and ``mke2fs -d`` the file system: nothing is mounted from a
loop device, and where user namespaces are allowed nobody needs to be root.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, RunFailedError
from fleetune.edge.protocol.files import file_sha256, read_bytes, write_atomic
from fleetune.tools.assets.fetch import cache_root
from fleetune.tools.programs import find_program, run_program
from fleetune.tools.staging import fill, locked, staged
from fleetune.tools.trees import set_modes, walk, write_tar

SUITE = "bookworm"
PACKAGES = (
    "ca-certificates",
    "dbus",
    "e2fsprogs",
    "init-system-helpers",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "libstdc++6",
    "linux-image-cloud-arm64",
    "netbase",
    "python3.11",
    "qemu-guest-agent",
    "systemd",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
)
"""Of the emulated board, beside what Debian cannot do without."""

CHORES = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
)
"""What a system in use does for itself. Here each jump of the clock would start it, in the midst of a test."""

KERNEL, INITRD, ROOTFS = "vmlinuz", "initrd.img", "rootfs.ext4"

_MIRROR = "apt-get update on Debian, elsewhere set FLEETUNE_DEBIAN to a mirror's address"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_REGISTER = "mount -t binfmt_misc binfmt_misc {0}; cat /usr/lib/binfmt.d/qemu-aarch64.conf > {0}/register"
_SLACK_MIB = 192
"""Room in the image beside its content; on its first boot a board grows it to the whole disk."""

_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_MAX_RECORD = 1 << 16
_INSTALL = """\
set -eu
PATH="$PATH:/usr/sbin:/sbin"
dpkg --root="$1" --force-architecture --install "$DEB" >&2
mkdir "$WORK/plain"
mount --bind "$1" "$WORK/plain"  # what is mounted below is none of the image's
used=$(du --summarize --one-file-system --block-size=1M "$WORK/plain" | cut -f1)
mke2fs -q -F -t ext4 -L fleetune -m 1 -d "$WORK/plain" "$WORK/rootfs.ext4" "$((used * 108 / 100 + SLACK))M"
umount "$WORK/plain"
"""


@dataclass(frozen=True)
class Image:
    """What the emulated board starts from.

    Attributes:
        rootfs: Its file system, without partitions.
        kernel: Its kernel.
        initrd: What the kernel needs to find the file system.
    """

    rootfs: Path
    kernel: Path
    initrd: Path


class _Record(msgspec.Struct, frozen=True):
    schema: int
    of: str
    files: dict[str, str]


def make_image(deb: Path, out: Path, say: Callable[[str], None]) -> Image:
    """Make the image of a package; an image of the same that is there already stays.

    Args:
        deb: What ``fleetune flash build --tier t4`` made.
        out: Folder for the files.
        say: Called with what is done next.

    Raises:
        ConfigError: A program is missing, or arm64 programs cannot be run here.
        RunFailedError: Debian cannot be had, or the package cannot be installed.
    """
    stem = f"{deb.name.removesuffix('.deb')}_qemu"
    image = Image(out / f"{stem}.ext4", out / f"{stem}.vmlinuz", out / f"{stem}.initrd")
    record = out / f"{stem}.json"
    key = hashlib.sha256(f"{_base_key()} {file_sha256(deb)} {_INSTALL}".encode()).hexdigest()
    if _stands(record, key, image):
        say(f"{image.rootfs} is there")
        return image
    base = _base(say)
    say("the package, and the file system")
    with staged(out) as scratch:
        hook = scratch / "install"
        hook.write_text(_INSTALL, encoding="utf-8")
        run_program(
            [
                *(find_program("mmdebstrap", "mmdebstrap"), "--quiet", "--variant=custom", "--architectures=arm64"),
                *("--skip=check/empty,check/qemu,setup,update,download,install,cleanup", "--format=null"),
                *(f'--setup-hook=tar --directory "$1" --extract --file "{base / "base.tar"}"',),
                *(f'--customize-hook=sh "{hook}" "$1"', SUITE, "/dev/null", debian_archive()),
            ],
            "see that the disk has room, and that the package is of tier t4",
            env={"DEB": str(deb.resolve()), "WORK": str(scratch), "SLACK": str(_SLACK_MIB)},
        )
        shutil.copyfile(base / KERNEL, scratch / KERNEL)
        shutil.copyfile(base / INITRD, scratch / INITRD)
        record.unlink(missing_ok=True)
        for name, path in ((ROOTFS, image.rootfs), (KERNEL, image.kernel), (INITRD, image.initrd)):
            (scratch / name).replace(path)
    files = {path.name: file_sha256(path) for path in (image.rootfs, image.kernel, image.initrd)}
    write_atomic(record, json.dumps({"schema": 1, "of": key, "files": files}, indent=1).encode() + b"\n")
    return image


def debian_archive() -> str:
    """Where Debian's packages come from: ``$FLEETUNE_DEBIAN``, else as apt is set up here.

    Raises:
        ConfigError: None is known here.
        RunFailedError: apt does not tell.
    """
    if chosen := os.environ.get("FLEETUNE_DEBIAN"):
        return chosen
    targets = ["Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main"]
    command = [find_program("apt-get", "apt"), "indextargets", "--format", "$(REPO_URI)", *targets]
    found = run_program(command, _MIRROR).split()
    if not found:
        raise ConfigError("no Debian archive is known here", _MIRROR)
    return found[0]


def check_foreign() -> None:
    """Check that programs for arm64 can be run here: packages have scripts.

    Raises:
        ConfigError: They cannot.
    """
    if platform.machine() == "aarch64":
        return
    try:
        state = (_BINFMT / "qemu-aarch64").read_text(encoding="ascii")
    except FileNotFoundError:
        state = ""
    if "enabled" not in state or "flags: " not in state or "F" not in state.partition("flags: ")[2].split("\n")[0]:
        raise ConfigError(
            "the kernel does not know what to do with programs for arm64",
            f"apt-get install qemu-user-static; where that does not register itself, as in a container, as root: "
            f"{_REGISTER.format(_BINFMT)}",
        )


def _stands(record: Path, key: str, image: Image) -> bool:
    """Whether a whole image of the same is there."""
    try:
        made = msgspec.json.decode(read_bytes(record, _MAX_RECORD), type=_Record)
    except (FileNotFoundError, *UNDECODABLE):  # it is made anew
        return False
    paths = (image.rootfs, image.kernel, image.initrd)
    return made.of == key and all(path.is_file() and made.files.get(path.name) == file_sha256(path) for path in paths)


def _base_key() -> str:
    """What a base is made of, in one word."""
    digest = hashlib.sha256(" ".join([SUITE, *PACKAGES, *CHORES, *_LEFT_OUT]).encode())
    here = Path(__file__).with_name("tree")
    for path in walk(here):
        if path.is_file():
            digest.update(f"{path.relative_to(here)}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()[:12]


def _base(say: Callable[[str], None]) -> Path:
    """The folder of the system without Fleetune, from the cache or else from a Debian archive."""
    root = cache_root() / "emulated-board"
    folder = root / f"{SUITE}-{_base_key()}"
    if folder.is_dir():
        return folder
    check_foreign()
    making = root / "making"
    making.mkdir(parents=True, exist_ok=True)
    with locked(making):  # whoever comes meanwhile waits, and takes it from the cache
        if not folder.is_dir():
            _make_base(root, folder, say)
    return folder


def _make_base(root: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Fill the folder from a Debian archive."""
    program = find_program("mmdebstrap", "mmdebstrap")
    if not _KEYRING.is_file():
        raise ConfigError("Debian's keys are not here", "apt-get install debian-archive-keyring")
    archive = debian_archive()
    say(f"Debian {SUITE} for arm64, in some minutes; the next image takes it from the cache")
    with staged(root) as scratch:
        made, own = scratch / "made", scratch / "own"
        made.mkdir()
        shutil.copytree(Path(__file__).with_name("tree"), own, copy_function=shutil.copyfile)
        set_modes(own)
        with (scratch / "own.tar").open("wb") as stream:
            write_tar(own, stream)
        run_program(
            [
                *(program, "--quiet", "--variant=minbase", "--architectures=arm64", "--format=tar"),
                *(f"--include={','.join(PACKAGES)}", f"--keyring={_KEYRING}", '--aptopt=Acquire::Languages "none"'),
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
                f"--setup-hook=tar-in {scratch / 'own.tar'} /",
                '--customize-hook=chroot "$1" systemctl enable systemd-networkd',
                f'--customize-hook=chroot "$1" systemctl mask {" ".join(CHORES)}',
                f"--customize-hook=copy-out /boot {scratch}",
                *(SUITE, str(made / "base.tar"), archive),
            ],
            "see that this machine reaches a Debian archive, or name a mirror in FLEETUNE_DEBIAN",
        )
        for name, pattern in ((KERNEL, "vmlinuz-*"), (INITRD, "initrd.img-*")):
            found = sorted((scratch / "boot").glob(pattern))
            if len(found) != 1:
                raise RunFailedError(f"the new system has no {name}", "see that the disk has room, and try again")
            found[0].replace(made / name)
        fill(made, folder)
