"""A flashing station without boards: USB ports, and programs that write down how they are called."""

from __future__ import annotations

import json
from pathlib import Path

from fleetune.edge.protocol.files import write_atomic

_STUB = """\
#!/bin/sh
# Stands for NVIDIA's program: writes down how it was called and what lay in the rootfs, and fails where a test says so.
bsp=$(cd "$(dirname "$0")" && while [ ! -e flash.sh ]; do cd ..; done; pwd)
seed=$(sed -n 's/.*"device": *"\\([^"]*\\)".*/\\1/p' "$bsp/rootfs/var/lib/fleetune/seed/seed.json" 2>/dev/null)
echo "$(basename "$0") $* seed=$seed" >> "$bsp/calls"
echo "flashing $*"
for word in "$@"; do [ ! -e "$bsp/fail-$word" ] || exit 3; done
[ ! -e "$bsp/kill" ] || kill -9 "$PPID"
"""


def make_bsp(folder: Path, release: str = "R32 (release), REVISION: 7.4", tier: str = "t1") -> Path:
    """A Linux_for_Tegra with a rootfs that has a kit."""
    bsp = folder / "Linux_for_Tegra"
    for name in ("flash.sh", "tools/kernel_flash/l4t_initrd_flash.sh"):
        program = bsp / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(_STUB, encoding="utf-8")
        program.chmod(0o755)
    for board in ("jetson-nano-devkit", "jetson-orin-nano-devkit"):
        (bsp / f"{board}.conf").write_text("# a board\n", encoding="utf-8")
    write(bsp / "rootfs/etc/nv_tegra_release", f"# {release}, GCID: 1, BOARD: any, EABI: aarch64\n")
    manifest = {"schema": 1, "fleetune": "0.1.0", "tier": tier, "kit": "0123456789ab", "files": {}}
    write(bsp / "rootfs/usr/share/fleetune/manifest.json", json.dumps(manifest))
    return bsp


def make_station(folder: Path, boards: dict[str, tuple[str, str]]) -> Path:
    """A root with USB ports (port → product id, serial number), an NFS server, and no mounts of note."""
    root = folder / "station"
    for port, (product, serial) in boards.items():
        write(root / f"sys/bus/usb/devices/{port}/idVendor", "0955\n")
        write(root / f"sys/bus/usb/devices/{port}/idProduct", f"{product}\n")
        if serial:
            write(root / f"sys/bus/usb/devices/{port}/serial", f"{serial}\n")
    write(root / "sys/bus/usb/devices/1-9/idVendor", "046d\n")  # a mouse
    write(root / "sys/bus/usb/devices/1-9/idProduct", "7f21\n")
    write(root / "proc/mounts", "/dev/sda1 / ext4 rw 0 0\n")
    write(root / "proc/cmdline", "root=/dev/sda1 quiet\n")
    write(root / "usr/lib/systemd/system/nfs-server.service", "[Unit]\n")
    return root


def write(file: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.encode())


def calls(bsp: Path) -> list[str]:
    """How the programs were called."""
    file = bsp / "calls"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
