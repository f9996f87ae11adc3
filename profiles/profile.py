"""A board's declared limits, and beside them what was measured on one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import ConfigError
from fleetune.profiles.measured import Measured
from fleetune.profiles.yamlfile import Document, Size, read_yaml, write_yaml

_Positive = Annotated[float, msgspec.Meta(gt=0)]

_REMEDY = "see docs/profiles.md for the fields and an example"
_SOURCELESS = ("schema", "name", "board", "tier", "sources", "measured")


class Processor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The CPU.

    Attributes:
        cores: How many it has.
        core: What its maker calls one.
        architecture: Instruction set, such as ``armv8.2-a``.
        max_mhz: The highest clock that any power mode allows.
    """

    cores: Annotated[int, msgspec.Meta(ge=1)]
    core: str
    architecture: str
    max_mhz: _Positive | None = None


class PowerMode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mode of ``nvpmodel``.

    Attributes:
        id: What ``nvpmodel -m`` takes.
        name: What its maker calls it.
        cores: How many are on.
        watts: What the module may draw; None where the mode has no such limit.
        max_mhz: The highest clock of the CPU.
    """

    id: Annotated[int, msgspec.Meta(ge=0)]
    name: str
    cores: Annotated[int, msgspec.Meta(ge=1)]
    watts: _Positive | None = None
    max_mhz: _Positive | None = None


class Thermal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Temperatures of the chip, in degrees Celsius.

    Attributes:
        throttles_c: From here on it lowers its clock.
        shuts_down_c: From here on it switches itself off.
    """

    throttles_c: _Positive | None = None
    shuts_down_c: _Positive | None = None


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of board, as its maker describes it. What could not be found there is None.

    Attributes:
        schema: Version of this layout.
        name: What fleet files call it; also its file's name.
        board: What its maker calls it.
        tier: Platform tier, ``t1`` to ``t4``.
        sources: Field, such as ``memory`` or ``processor.max_mhz`` → the document that the value is from.
        memory: All of its memory, shared with the GPU where there is one; None if the profile is not of one board.
        processor: Its CPU.
        power_modes: Its modes; empty where it has none.
        thermal: When it slows down and when it stops.
        rtc: What keeps the time while the power is off: nothing, a battery that has to be bought, or one on board.
        device_trees: What the names of such boards in their device trees begin with.
        measured: What `fleetune profile` measured on one such board; no shipped profile has any.
    """

    schema: Literal[1]
    name: str
    board: str
    tier: Literal["t1", "t2", "t3", "t4"]
    sources: dict[str, str]
    memory: Size | None = None
    processor: Processor | None = None
    power_modes: tuple[PowerMode, ...] = ()
    thermal: Thermal | None = None
    rtc: Literal["none", "needs-battery", "battery"] | None = None
    device_trees: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()


def profile_names() -> list[str]:
    """Names of the profiles that Fleetune ships."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files("fleetune.profiles").iterdir()
        if file.name.endswith(".yaml")
    )


def read_profile(name: str, beside: Path = Path()) -> Profile:
    """Read a shipped profile by its name, or any file by its path (with a ``/`` or ``.yaml`` in it).

    Args:
        name: The name or the path.
        beside: Folder that a relative path begins at.

    Raises:
        ConfigError: There is no such profile, it does not fit the schema, it contradicts itself, or a value has no
            source.
    """
    if "/" in name or name.endswith(".yaml"):
        return _read(beside / name)
    if name in profile_names():
        with resources.as_file(resources.files("fleetune.profiles") / f"{name}.yaml") as file:
            return _read(file)
    raise ConfigError(f"profile: {name!r} is unknown", f"use a path, or one of {', '.join(profile_names())}")


def _read(path: Path) -> Profile:
    document = read_yaml(path, Profile, _REMEDY)
    _check_power_modes(document)
    _check_thermal(document)
    _check_sources(document)
    _check_measured(document)
    return document.value


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile, atomically."""
    head = "Declared limits of the board, each with its source; and under `measured`, what one device measured."
    write_yaml(path, profile, head)


def detect_profile(device_tree: str | None, memory_mib: float | None, machine: str) -> Profile | None:
    """The shipped profile of a board; None if it cannot be told.

    Args:
        device_tree: The board's name in its device tree.
        memory_mib: Memory that its kernel manages: less than the board has, as firmware keeps some.
        machine: Instruction set, as `uname -m` says it.
    """
    if device_tree is None:
        return read_profile("x86-64") if machine == "x86_64" else None
    shipped = [read_profile(name) for name in profile_names()]
    fits = [
        profile
        for profile in shipped
        if profile.memory is not None
        and any(device_tree.startswith(name) for name in profile.device_trees)
        and (memory_mib is None or memory_mib <= profile.memory.mib)
    ]
    return min(fits, key=lambda profile: profile.memory.mib if profile.memory else 0.0, default=None)


def _check_power_modes(document: Document[Profile]) -> None:
    ids, names, processor = set[int](), set[str](), document.value.processor
    for index, mode in enumerate(document.value.power_modes):
        field = f"power_modes[{index}]"
        if mode.id in ids:
            raise ConfigError(f"{document.where(f'{field}.id')}: {mode.id} is there twice", "give each mode its own id")
        if mode.name in names:
            raise ConfigError(
                f"{document.where(f'{field}.name')}: {mode.name!r} is there twice", "give each mode its own name"
            )
        ids.add(mode.id)
        names.add(mode.name)
        if processor is not None and mode.cores > processor.cores:
            raise ConfigError(
                f"{document.where(f'{field}.cores')}: {mode.cores} cores are more than the board's {processor.cores}",
                "correct the mode or processor.cores",
            )
        if processor is None or processor.max_mhz is None or mode.max_mhz is None:
            continue
        if mode.max_mhz > processor.max_mhz:
            raise ConfigError(
                f"{document.where(f'{field}.max_mhz')}: {mode.max_mhz:.10g} MHz are above the processor's "
                f"{processor.max_mhz:.10g} MHz",
                "correct the mode or processor.max_mhz",
            )


def _check_thermal(document: Document[Profile]) -> None:
    thermal = document.value.thermal
    if thermal is None or thermal.throttles_c is None or thermal.shuts_down_c is None:
        return
    if thermal.throttles_c >= thermal.shuts_down_c:
        raise ConfigError(
            f"{document.where('thermal.throttles_c')}: {thermal.throttles_c:.10g} °C are not below shuts_down_c, "
            f"{thermal.shuts_down_c:.10g} °C",
            "a board slows down before it switches off: correct one of them",
        )


def _check_measured(document: Document[Profile]) -> None:
    profile = document.value
    for index, measured in enumerate(profile.measured):
        field = f"measured[{index}]"
        if profile.memory is not None and measured.memory_mib > profile.memory.mib:
            raise ConfigError(
                f"{document.where(f'{field}.memory_mib')}: {measured.memory_mib:g} MiB are more than the board's "
                f"{profile.memory}",
                "it was measured on another board: name that one with `fleetune profile --board`",
            )
        if found := measured.contradiction:
            raise ConfigError(f"{document.where(f'{field}.{found[0]}')}: {found[1]}", "measure again")
        if any(measured.replaces(other) for other in profile.measured[:index]):
            raise ConfigError(
                f"{document.where(field)}: the same pack, threads and power mode are there twice", "delete the older"
            )


def _check_sources(document: Document[Profile]) -> None:
    sources, stated = document.value.sources, _stated(document.value)
    known = dict.fromkeys(field for fields in stated.values() for field in fields)
    for field, source in sources.items():
        if field not in known:
            raise ConfigError(
                f"{document.where(f'sources.{field}')}: the profile has no value {field!r} that needs a source",
                f"remove the entry, or use one of {', '.join(known)}" if known else "remove the entry",
            )
        if not source.strip():
            raise ConfigError(f"{document.where(f'sources.{field}')}: {source!r} is no source", "name a document")
    for field, vouchers in stated.items():
        if not any(voucher in sources for voucher in vouchers):
            raise ConfigError(
                f"{document.where(field)}: the value has no source",
                f"name its document at sources.{field}, or leave out what no document states",
            )


def _stated(profile: Profile) -> dict[str, tuple[str, ...]]:
    """Each value that needs a source → the fields whose source may vouch for it: itself, and what holds it."""
    stated: dict[str, tuple[str, ...]] = {}
    for name, value in msgspec.structs.asdict(profile).items():
        if name in _SOURCELESS or value in (None, ()):
            continue
        if isinstance(value, msgspec.Struct):
            parts = (part for part, inner in msgspec.structs.asdict(value).items() if inner is not None)
            stated |= {f"{name}.{part}": (name, f"{name}.{part}") for part in parts}
        else:
            stated[name] = (name,)
    return stated
