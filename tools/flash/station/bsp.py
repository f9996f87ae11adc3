"""NVIDIA's board support package, ``Linux_for_Tegra``: its release, its boards, and what lies in its rootfs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import read_bytes
from fleetune.tools.manifest import read_manifest

FLASH, INITRD_FLASH = Path("flash.sh"), Path("tools/kernel_flash/l4t_initrd_flash.sh")

TIERS = {"t1": (32,), "t2": (36,), "t3": (38, 39)}
"""Tier → major releases of L4T that it runs on."""

L4T_RELEASE = re.compile(rb"^# R(\d+) \(release\), REVISION: ([0-9.]+)")


@dataclass(frozen=True)
class Bsp:
    """One of them.

    Attributes:
        path: The folder.
        release: Major and minor release of L4T; None where its rootfs is empty.
        tier: Tier of the kit in its rootfs; empty without one.
        kit: Name of that kit.
    """

    path: Path
    release: tuple[int, str] | None
    tier: str
    kit: str

    @property
    def rootfs(self) -> Path:
        """What becomes the boards' root file system."""
        return self.path / "rootfs"

    @property
    def image(self) -> str:
        """What boards are flashed with, in one word: the system's release and the kit."""
        release = self.release or (0, "0")
        return hashlib.sha256(f"R{release[0]}.{release[1]} {self.tier} {self.kit}".encode()).hexdigest()

    def knows(self, board: str) -> bool:
        """Whether it has a configuration of this name."""
        return re.fullmatch(r"[A-Za-z0-9._-]+", board) is not None and (self.path / f"{board}.conf").is_file()

    @property
    def boards(self) -> list[str]:
        """Names of the boards that it knows."""
        return sorted(file.stem for file in self.path.glob("*.conf"))


def read_bsp(path: Path) -> Bsp:
    """Look at one.

    Raises:
        ConfigError: It is none, or what Fleetune put into it is damaged.
    """
    if not (path / FLASH).is_file():
        raise ConfigError(f"--bsp: {path} has no {FLASH}", "name the folder Linux_for_Tegra of NVIDIA's driver package")
    release = None
    try:
        if found := L4T_RELEASE.match(read_bytes(path / "rootfs/etc/nv_tegra_release", 1 << 16)):
            release = int(found[1]), found[2].decode("ascii")
    except FileNotFoundError:
        pass
    manifest = read_manifest(path / "rootfs")
    return Bsp(path, release, manifest.tier if manifest else "", manifest.kit if manifest else "")
