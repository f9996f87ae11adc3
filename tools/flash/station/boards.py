"""Boards in recovery mode, as USB shows them: what NVIDIA's programs can flash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NVIDIA = "0955"


@dataclass(frozen=True)
class Module:
    """What answers in recovery mode under one USB id.

    Attributes:
        name: Of the module.
        tiers: Platform tiers of Fleetune that run on it.
        profiles: Profiles that Fleetune ships for it.
    """

    name: str
    tiers: tuple[str, ...]
    profiles: tuple[str, ...]


_ORIN = ("t2", "t3")

MODULES = {
    "7f21": Module("Jetson Nano", ("t1",), ("jetson-nano-2gb", "jetson-nano-4gb")),
    "7323": Module("Jetson Orin NX 16GB", _ORIN, ("orin-nx-16gb",)),
    "7423": Module("Jetson Orin NX 8GB", _ORIN, ()),
    "7523": Module("Jetson Orin Nano 8GB", _ORIN, ("orin-nano-8gb",)),
    "7623": Module("Jetson Orin Nano 4GB", _ORIN, ("orin-nano-4gb",)),
}
"""USB product id in recovery mode → module (NVIDIA, Jetson Linux Developer Guide, "Quick Start")."""


@dataclass(frozen=True)
class Found:
    """A board in recovery mode.

    Attributes:
        port: The USB port's path, such as ``1-2.3``; NVIDIA's programs call it the USB instance.
        product: USB product id.
        serial: What it calls its serial number; empty where it tells none.
    """

    port: str
    product: str
    serial: str

    @property
    def module(self) -> Module | None:
        """What it is; None for another product of NVIDIA's, such as a board that runs its system."""
        return MODULES.get(self.product)


def boards_in_recovery(root: Path = Path("/")) -> list[Found]:
    """All of them, by port; ``root`` is where ``/sys`` is."""
    found = []
    for device in sorted((root / "sys/bus/usb/devices").glob("*")):
        if _read(device / "idVendor") == NVIDIA:
            one = Found(device.name, _read(device / "idProduct"), _read(device / "serial"))
            if one.module is not None:
                found.append(one)
    return found


def _read(file: Path) -> str:
    try:
        return file.read_bytes()[:256].decode("ascii", "replace").strip().lower()
    except FileNotFoundError:  # not all have it; or the board was unplugged just now
        return ""
