"""A fleet file: the devices of a fleet, the profile of each, and what each may spend on training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.topics import check_name
from fleetune.edge.resources.planner import Budget
from fleetune.profiles.profile import Profile, read_profile
from fleetune.profiles.yamlfile import parse_mib, read_yaml

_REMEDY = "see docs/fleet-file.md for the fields and an example"


class _Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory: str
    cpu_seconds: float


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
        ConfigError: It does not fit the schema, two devices share an id, or a budget exceeds the board.
    """
    file = read_yaml(path, _File, _REMEDY)
    check_name(f"{path}: field fleet", file.fleet)
    devices: dict[str, FleetDevice] = {}
    for index, entry in enumerate(file.devices):
        where = f"{path}: field devices[{index}]"
        check_name(f"{where}.id", entry.id)
        if entry.id in devices:
            raise ConfigError(f"{where}.id: {entry.id!r} is there twice", "give every device an id of its own")
        try:
            profile = read_profile(entry.profile)
        except ConfigError as error:
            raise ConfigError(f"{where}.profile: {error.what}", error.remedy) from error
        memory = parse_mib(entry.budget.memory, f"{where}.budget.memory")
        if not 0 < memory <= profile.memory_mib:
            raise ConfigError(
                f"{where}.budget.memory: {entry.budget.memory} is not within the board's {profile.memory}",
                "leave room for the system and the board's other work",
            )
        if not entry.budget.cpu_seconds > 0:
            raise ConfigError(
                f"{where}.budget.cpu_seconds: {entry.budget.cpu_seconds} is not above zero", "give it some CPU seconds"
            )
        devices[entry.id] = FleetDevice(entry.id, profile, Budget(memory, entry.budget.cpu_seconds))
    if not devices:
        raise ConfigError(f"{path}: field devices: the list is empty", "add a device")
    return Fleet(file.fleet, tuple(devices.values()))
