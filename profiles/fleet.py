"""A fleet file: the devices of a fleet, the profile of each, and what each may spend on training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import ConfigError, DuplicateDeviceError
from fleetune.edge.protocol.topics import check_name
from fleetune.edge.resources.limits import Budget
from fleetune.profiles.profile import Profile, read_profile
from fleetune.profiles.yamlfile import Size, read_yaml

_REMEDY = "see docs/fleet-file.md for the fields and an example"


_Positive = Annotated[float, msgspec.Meta(gt=0)]


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


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    profile: str
    budget: _Budget


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
    """

    id: str
    profile: Profile
    budget: Budget


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
        DuplicateDeviceError: Two devices share an id.
    """
    document = read_yaml(path, _File, _REMEDY)
    check_name(document.where("fleet"), document.value.fleet)
    devices, profiles = dict[str, FleetDevice](), dict[str, Profile]()
    for index, entry in enumerate(document.value.devices):
        field = f"devices[{index}]"
        check_name(document.where(f"{field}.id"), entry.id)
        if entry.id in devices:
            raise DuplicateDeviceError(
                f"{document.where(f'{field}.id')}: {entry.id!r} is there twice", "give every device an id of its own"
            )
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
        devices[entry.id] = FleetDevice(entry.id, profile, entry.budget.as_budget())
    if not devices:
        raise ConfigError(f"{document.where('devices')}: the list is empty", "add a device")
    return Fleet(document.value.fleet, tuple(devices.values()))
