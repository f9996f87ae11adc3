"""Heat: what the board's sensors say, at which temperatures it slows down, and whether it does so now."""

from __future__ import annotations

import msgspec

from fleetune.edge.resources.probes.tree import Tree, integer

_FOLDER = "/sys/class/thermal"
# A sensor without power, or a trip point that is switched off, reports something far outside of these.
_COLDEST_C, _HOTTEST_C = -60.0, 200.0
_NOW, _BEFORE = 0, 16  # bits of a Raspberry Pi's get_throttled: what is, and what was since it started


class Trip(msgspec.Struct, frozen=True):
    """A temperature at which something happens.

    Attributes:
        kind: ``active`` starts a fan, ``passive`` slows the board down, ``hot`` warns, ``critical`` switches it off.
        temperature_c: The temperature.
    """

    kind: str
    temperature_c: float


class Binding(msgspec.Struct, frozen=True):
    """A cooling device that a zone uses.

    Attributes:
        device: Name of the cooling device, such as ``cooling_device0``.
        trip: Kind of the trip point that it serves; None if it is not bound to one.
    """

    device: str
    trip: str | None


class Zone(msgspec.Struct, frozen=True):
    """A thermal zone.

    Attributes:
        name: Such as ``thermal_zone0``.
        kind: What it measures, such as ``CPU-therm``.
        temperature_c: Its temperature; None where the sensor has no power.
        trips: Its trip points.
        bindings: Its cooling devices.
    """

    name: str
    kind: str | None
    temperature_c: float | None
    trips: tuple[Trip, ...]
    bindings: tuple[Binding, ...]

    @property
    def margin_c(self) -> float | None:
        """Degrees below the lowest passive or hot trip point, negative above it; None where there is none."""
        limits = [trip.temperature_c for trip in self.trips if trip.kind in ("passive", "hot")]
        return min(limits) - self.temperature_c if limits and self.temperature_c is not None else None

    @property
    def slows_down(self) -> bool:
        """Whether it is as warm as a passive trip point."""
        limits = [trip.temperature_c for trip in self.trips if trip.kind == "passive"]
        return self.temperature_c is not None and any(self.temperature_c >= limit for limit in limits)


class CoolingDevice(msgspec.Struct, frozen=True):
    """Something that cools: a fan, or a lower clock.

    Attributes:
        name: Such as ``cooling_device0``.
        kind: Such as ``pwm-fan`` or ``cpufreq-cpu0``.
        state: How much it cools, from 0 (not) to ``max_state``.
        max_state: As much as it can.
    """

    name: str
    kind: str | None
    state: int | None
    max_state: int | None


class Firmware(msgspec.Struct, frozen=True):
    """What a Raspberry Pi's firmware says: `get_throttled`, as its documentation of `vcgencmd` defines it.

    Attributes:
        under_voltage: The supply is too weak.
        frequency_capped: The processor's clock is capped.
        throttled: The processor is throttled.
        soft_limit: The temperature is above the soft limit.
        under_voltage_before: The supply was too weak since the board started; the others likewise.
        frequency_capped_before: The clock was capped.
        throttled_before: The processor was throttled.
        soft_limit_before: The temperature was above the soft limit.
    """

    under_voltage: bool
    frequency_capped: bool
    throttled: bool
    soft_limit: bool
    under_voltage_before: bool
    frequency_capped_before: bool
    throttled_before: bool
    soft_limit_before: bool


class Thermal(msgspec.Struct, frozen=True):
    """All zones and cooling devices.

    Attributes:
        zones: Thermal zones; empty in most virtual machines.
        cooling: Cooling devices.
        firmware: What the firmware of a Raspberry Pi says.
    """

    zones: tuple[Zone, ...]
    cooling: tuple[CoolingDevice, ...]
    firmware: Firmware | None

    @property
    def margin_c(self) -> float | None:
        """Degrees until the first zone meets a passive or hot trip point; None where no zone has one."""
        return min((zone.margin_c for zone in self.zones if zone.margin_c is not None), default=None)

    @property
    def throttling(self) -> bool | None:
        """Whether heat, or a weak supply, slows the board down now; None where nothing tells.

        A cooling device that serves a passive trip point is at work, a zone is as warm as one, or the firmware says so.
        """
        if self.firmware is None and all(zone.temperature_c is None for zone in self.zones):
            return None
        slowing = {item.device for zone in self.zones for item in zone.bindings if item.trip == "passive"}
        firmware = self.firmware
        return (
            any(device.state and device.name in slowing for device in self.cooling)
            or any(zone.slows_down for zone in self.zones)
            or (firmware is not None and (firmware.throttled or firmware.frequency_capped or firmware.soft_limit))
        )


def read_thermal(tree: Tree) -> Thermal:
    """Heat as it is now. On a board with many zones, some sensors answer only after several milliseconds."""
    return Thermal(
        zones=tuple(_zone(tree, name) for name in tree.names(_FOLDER, "thermal_zone[0-9]+")),
        cooling=tuple(_cooling(tree, name) for name in tree.names(_FOLDER, "cooling_device[0-9]+")),
        firmware=_firmware(tree),
    )


def _zone(tree: Tree, name: str) -> Zone:
    folder = f"{_FOLDER}/{name}"
    trips = {}
    for file in tree.names(folder, "trip_point_[0-9]+_type"):
        number = file.split("_")[2]
        kind = tree.text(f"{folder}/{file}", 64)
        temperature = _temperature_c(tree, f"{folder}/trip_point_{number}_temp")
        if kind and temperature is not None:
            trips[number] = Trip(kind, temperature)
    bindings = []
    for link in tree.names(folder, "cdev[0-9]+"):
        device = tree.link(f"{folder}/{link}")
        trip = trips.get(tree.text(f"{folder}/{link}_trip_point", 64) or "")
        if device:
            bindings.append(Binding(device, trip.kind if trip else None))
    return Zone(
        name=name,
        kind=tree.text(f"{folder}/type", 64),
        temperature_c=_temperature_c(tree, f"{folder}/temp"),
        trips=tuple(trips.values()),
        bindings=tuple(bindings),
    )


def _temperature_c(tree: Tree, path: str) -> float | None:
    value = tree.integer(path)
    return value / 1000 if value is not None and _COLDEST_C <= value / 1000 <= _HOTTEST_C else None


def _cooling(tree: Tree, name: str) -> CoolingDevice:
    folder = f"{_FOLDER}/{name}"
    return CoolingDevice(
        name=name,
        kind=tree.text(f"{folder}/type", 64),
        state=tree.integer(f"{folder}/cur_state"),
        max_state=tree.integer(f"{folder}/max_state"),
    )


def _firmware(tree: Tree) -> Firmware | None:
    for soc in tree.names("/sys/devices/platform", "soc.*"):
        for name in tree.names(f"/sys/devices/platform/{soc}", "soc.*:firmware"):
            path = f"/sys/devices/platform/{soc}/{name}/get_throttled"
            text = tree.text(path, 64)
            if text is None:
                continue
            bits = integer(text, 16)
            if bits is None:
                tree.skip(path, f"not a number: {text!r}")
                return None
            return Firmware(*(bool(bits >> start + bit & 1) for start in (_NOW, _BEFORE) for bit in range(4)))
    return None
