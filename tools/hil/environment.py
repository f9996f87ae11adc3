"""Writes a labgrid environment for each board of a fleet: labgrid runs a suite on one board, so each has one."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import yaml

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.profiles.fleet import Fleet, FleetDevice

TEMPLATES = Path(__file__).with_name("environments")

_KINDS = {"Jetson Nano": "jetson-nano", "Orin": "jetson-orin", "Raspberry Pi": "raspberry-pi"}
"""What the maker's name of a board has in it → template."""

_MAX = 1 << 18


def write_environments(
    fleet: Fleet, out: Path, *, place: str = "{id}", power: str = "NetworkPowerDriver", template: Path | None = None
) -> dict[str, list[str]]:
    """Write them. A file that is there stays as it is: it may have been changed by hand.

    Args:
        fleet: The boards.
        out: Folder.
        place: Labgrid's place of a board, with ``{id}`` for its id.
        power: Labgrid's driver for the power of a board.
        template: Of every environment; None for that of each kind of board.

    Returns:
        ``new`` and ``kept`` → names of files.

    Raises:
        ConfigError: A board is of an unknown kind, or a template does not make an environment.
        OSError: A file cannot be read or written.
    """
    if not power.isidentifier():
        raise ConfigError(f"--power: {power!r} is no driver", "name one of labgrid's, such as NetworkPowerDriver")
    made = dict[str, list[str]](new=[], kept=[])
    texts = {
        f"{device.id}.yaml": _environment(
            template or _template(device), device, place.replace("{id}", device.id), power
        )
        for device in fleet.devices
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if (out / name).exists():
            made["kept"].append(name)
        else:
            write_atomic(out / name, text.encode())
            made["new"].append(name)
    return made


def _template(device: FleetDevice) -> Path:
    for word, name in _KINDS.items():
        if word in device.profile.board:
            return TEMPLATES / f"{name}.yaml"
    raise ConfigError(
        f"{device.id}: there is no template for the board {device.profile.board!r}",
        f"name a file with --template; {TEMPLATES} has those of {', '.join(_KINDS)}",
    )


def _environment(template: Path, device: FleetDevice, place: str, power: str) -> str:
    text = string.Template(read_bytes(template, _MAX).decode("utf-8"))
    try:
        filled = text.substitute(device=device.id, place=place, power=power)
        document = yaml.safe_load(filled)
    except (KeyError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{template}: {error!r}", "a template is YAML with $device, $place and $power in it; $$ is a dollar sign"
        ) from error
    drivers = document.get("targets", {}).get("main", {}).get("drivers", []) if isinstance(document, dict) else []
    names = [name for driver in drivers for name in driver] if isinstance(drivers, Sequence) else []
    if "FleetuneStrategy" not in names:
        raise ConfigError(f"{template}: targets.main.drivers has no FleetuneStrategy", "add `- FleetuneStrategy: {}`")
    return filled
