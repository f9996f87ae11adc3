"""Heat and power: what makes a board train more slowly than it could."""

from __future__ import annotations

from fleetune.edge.resources.probes.battery import Battery
from fleetune.edge.resources.probes.machine import Machine
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.notes import Note, noted


def check_heat(machine: Machine) -> Check:
    """Whether heat, a power mode or a battery holds the board back; never a failure."""
    empties = [battery for battery in machine.batteries if battery.status == "Discharging"]
    notes = [*_slowed(machine), *(Note(_in_words(battery), "connect the supply") for battery in empties)]
    return noted("heat", _found(machine), notes)


def _found(machine: Machine) -> str:
    warmest = max(
        (zone.temperature_c for zone in machine.thermal.zones if zone.temperature_c is not None), default=None
    )
    margin, watts = machine.thermal.margin_c, machine.power.board_w
    mode = machine.tegra.power_mode if machine.tegra else None
    parts = [
        "no temperature to be read" if warmest is None else f"{warmest:.0f} °C",
        "" if margin is None else f"{margin:.0f} °C below the first limit",
        f"power mode {mode.name or mode.number}" if mode else "",
        "" if watts is None else f"{watts:.1f} W",
        *(_in_words(battery) for battery in machine.batteries if battery.status != "Discharging"),
    ]
    return ", ".join(part for part in parts if part)


def _slowed(machine: Machine) -> list[Note]:
    notes = []
    firmware, processor = machine.thermal.firmware, machine.processor
    if firmware is not None and (firmware.under_voltage or firmware.under_voltage_before):
        when = "is" if firmware.under_voltage else "was, since it started,"
        notes.append(Note(f"the supply {when} too weak", "use the board's own supply, with a short cable"))
    if machine.thermal.throttling:
        notes.append(Note("slowed down now", "cool it: a fan, a larger heat sink, or a lower power mode"))
    if processor.cores and processor.cores_present and processor.cores < processor.cores_present:
        notes.append(
            Note(
                f"{processor.cores} of {processor.cores_present} cores are on",
                "sudo nvpmodel -m 0, if the supply is strong enough" if machine.tegra else "",
            )
        )
    return notes


def _in_words(battery: Battery) -> str:
    charge = "" if battery.charge_percent is None else f" {battery.charge_percent} %,"
    minutes = "" if battery.time_left_s is None else f", {battery.time_left_s / 60:.0f} minutes left"
    return f"battery {battery.name}{charge} {(battery.status or 'unknown').lower()}{minutes}"
