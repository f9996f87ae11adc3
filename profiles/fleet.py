"""A fleet file: the devices of a fleet, the profile of each, and what each may spend on training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import ConfigError, DuplicateDeviceError
from fleetune.edge.protocol.topics import check_name
from fleetune.edge.resources.limits import Budget
from fleetune.profiles.profile import Profile, profile_names, read_profile
from fleetune.profiles.yamlfile import Size, read_yaml, to_yaml

_REMEDY = "see docs/fleet-file.md for the fields and an example"


PROFILE_ENDING = ".profile.yaml"
"""Of a profile that lies beside a fleet file."""

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Serial = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}\Z")]


class _Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory: Size
    cpu_seconds: _Positive | None = None
    seconds: _Positive | None = None
    joules: _Positive | None = None
    disk: Size | None = None

    def as_budget(self) -> Budget:
        """What is not limited is infinite."""
        unlimited = math.inf
        return Budget(
            memory_mib=self.memory.mib,
            cpu_s=self.cpu_seconds or unlimited,
            disk_mib=self.disk.mib if self.disk else unlimited,
            deadline_s=self.seconds or unlimited,
            joules=self.joules or unlimited,
        )

    @classmethod
    def of(cls, budget: Budget) -> _Budget:
        """The same, as it is written."""

        def limit(value: float) -> float | None:
            return None if math.isinf(value) else value

        disk = None if math.isinf(budget.disk_mib) else Size(f"{budget.disk_mib:.9g}MiB")
        return cls(
            Size(f"{budget.memory_mib:.9g}MiB"),
            limit(budget.cpu_s),
            limit(budget.deadline_s),
            limit(budget.joules),
            disk,
        )


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    profile: str
    budget: _Budget
    serial: _Serial | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: Literal[1]
    fleet: str
    devices: list[_Entry]


class FleetDevice(msgspec.Struct, frozen=True):
    """One device.

    Attributes:
        id: Its id.
        profile: Its board.
        budget: What the board's other work leaves over for training.
        serial: The board's serial number, where the file names it.
    """

    id: str
    profile: Profile
    budget: Budget
    serial: str | None = None


class Fleet(msgspec.Struct, frozen=True):
    """The fleet's name and devices."""

    name: str
    devices: tuple[FleetDevice, ...]

    def device(self, device_id: str) -> FleetDevice:
        """The device with this id.

        Raises:
            ConfigError: There is none.
        """
        for device in self.devices:
            if device.id == device_id:
                return device
        raise ConfigError(
            f"the fleet {self.name} has no device {device_id!r}",
            f"use one of {', '.join(device.id for device in self.devices)}",
        )


def read_fleet(path: Path) -> Fleet:
    """Read a fleet file.

    Raises:
        ConfigError: It does not fit the schema, or a budget exceeds the board.
        DuplicateDeviceError: Two devices share an id, or a serial number.
    """
    document = read_yaml(path, _File, _REMEDY)
    check_name(document.where("fleet"), document.value.fleet)
    devices, profiles, serials = dict[str, FleetDevice](), dict[str, Profile](), dict[str, str]()
    for index, entry in enumerate(document.value.devices):
        field = f"devices[{index}]"
        check_name(document.where(f"{field}.id"), entry.id)
        if entry.id in devices:
            raise DuplicateDeviceError(
                f"{document.where(f'{field}.id')}: {entry.id!r} is there twice", "give every device an id of its own"
            )
        if entry.serial is not None:
            if entry.serial in serials:
                raise DuplicateDeviceError(
                    f"{document.where(f'{field}.serial')}: the serial number {entry.serial} is that of "
                    f"{serials[entry.serial]} already, and of {entry.id}",
                    "a serial number is one board's: look at both",
                )
            serials[entry.serial] = entry.id
        try:
            if entry.profile not in profiles:
                profiles[entry.profile] = read_profile(entry.profile, beside=path.parent)
        except ConfigError as error:
            raise ConfigError(f"{document.where(f'{field}.profile')}: {error.what}", error.remedy) from error
        profile, memory = profiles[entry.profile], entry.budget.memory
        if profile.memory is not None and memory.mib > profile.memory.mib:
            raise ConfigError(
                f"{document.where(f'{field}.budget.memory')}: {memory} is not within the board's {profile.memory}",
                "leave room for the system and the board's other work",
            )
        devices[entry.id] = FleetDevice(entry.id, profile, entry.budget.as_budget(), entry.serial)
    if not devices:
        raise ConfigError(f"{document.where('devices')}: the list is empty", "add a device")
    return Fleet(document.value.fleet, tuple(devices.values()))


def fleet_files(fleet: Fleet) -> dict[str, bytes]:
    """A fleet file, ``fleet.yaml``, and beside it the profiles that Fleetune does not ship: name → content."""
    files, entries, shipped = dict[str, bytes](), list[_Entry](), profile_names()
    for device in fleet.devices:
        name = device.profile.name
        if name not in shipped or read_profile(name) != device.profile:
            name = f"{name}{PROFILE_ENDING}"
            files[name] = to_yaml(device.profile, f"The profile {device.profile.name}.")
        entries.append(_Entry(device.id, name, _Budget.of(device.budget), device.serial))
    return files | {"fleet.yaml": to_yaml(_File(1, fleet.name, entries), f"Of the fleet {fleet.name}.")}
