"""The battery of a board that has one: its charge, and the power that it gives."""

from __future__ import annotations

import msgspec

from fleetune.edge.resources.probes.tree import Tree

_FOLDER = "/sys/class/power_supply"


class Battery(msgspec.Struct, frozen=True):
    """A battery, as `/sys/class/power_supply` describes it.

    Attributes:
        name: Such as ``BAT0``.
        charge_percent: What is left.
        status: ``Charging``, ``Discharging``, ``Full``, ``Not charging`` or ``Unknown``.
        power_w: What it gives, or takes while it is charged; some report that as a negative number.
        energy_left_wh: What is left.
    """

    name: str
    charge_percent: int | None
    status: str | None
    power_w: float | None
    energy_left_wh: float | None

    @property
    def time_left_s(self) -> float | None:
        """Seconds until it is empty at the present power; None while it does not discharge, or where it cannot tell."""
        if self.status != "Discharging" or self.energy_left_wh is None or not self.power_w:
            return None
        return self.energy_left_wh * 3600 / abs(self.power_w)


def read_batteries(tree: Tree) -> tuple[Battery, ...]:
    """Batteries that power the board; those of a mouse or a headset are left out.

    psutil reads the same files, but neither another root's nor the power.
    """
    batteries = []
    for name in tree.names(_FOLDER, ".+"):
        folder = f"{_FOLDER}/{name}"
        if tree.text(f"{folder}/type", 64) != "Battery" or tree.text(f"{folder}/scope", 64) == "Device":
            continue
        volts = _micro(tree, f"{folder}/voltage_now")
        power = _micro(tree, f"{folder}/power_now")
        energy = _micro(tree, f"{folder}/energy_now")
        batteries.append(
            Battery(
                name=name,
                charge_percent=tree.integer(f"{folder}/capacity"),
                status=tree.text(f"{folder}/status", 64),
                power_w=_product(volts, _micro(tree, f"{folder}/current_now")) if power is None else power,
                energy_left_wh=_product(volts, _micro(tree, f"{folder}/charge_now")) if energy is None else energy,
            )
        )
    return tuple(batteries)


def _micro(tree: Tree, path: str) -> float | None:
    value = tree.integer(path)
    return None if value is None else value / 1e6


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second
