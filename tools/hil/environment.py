"""Writes a labgrid environment for each board of a fleet, and checks it: labgrid runs a suite on one board."""

from __future__ import annotations

import os
import socket
import string
from pathlib import Path
from typing import Any

import attr
import yaml

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.profiles.fleet import Fleet, FleetDevice

TEMPLATES = Path(__file__).with_name("environments")

DEVICE_OPTION, TTY_OPTION = "fleetune_device", "fleetune_tty"
"""Options of an environment: which device of the fleet its board is, and what its serial console is called there."""

STRATEGY, MODULE = "FleetuneStrategy", "fleetune.tools.hil.strategy"
COORDINATOR = "127.0.0.1:20408"
"""Labgrid's own default."""

_PATIENCE_S = 5.0

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
    _check_power(power)
    if "{" in place.replace("{id}", ""):
        raise ConfigError(f"--place: {place!r}: only {{id}} is filled in", "write such as 'rack-1-{id}'")
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
    _check(document, str(template))
    return filled


def read_environment(file: Path) -> str:
    """Check one, before a run begins: for labgrid each mistake is another exception, and some come late.

    Returns:
        The device that its board is.

    Raises:
        ConfigError: It is none, or nobody answers who has its board.
    """
    from labgrid.config import Config
    from labgrid.exceptions import InvalidConfigError

    read_bytes(file, _MAX)  # no larger than that
    try:
        document = Config(str(file)).data  # with what `!template` stands for
    except (InvalidConfigError, ValueError, TypeError) as error:
        what = f"{file} is not YAML, or none of labgrid's: {' '.join(str(error).split())}"
        raise ConfigError(what, "mend it there") from error
    target, options = _check(document, str(file)), document["options"]
    if "RemotePlace" in _named(target.get("resources")):
        _ask_coordinator(str(options.get("coordinator_address") or os.environ.get("LG_COORDINATOR", COORDINATOR)), file)
    return str(options[DEVICE_OPTION])


def _check(document: Any, where: str) -> dict[str, Any]:
    """The target of an environment that is one."""
    target, imports = _inside(document, "targets", "main"), _inside(document).get("imports")
    modules, drivers = imports if isinstance(imports, list) else [], _named(target.get("drivers"))
    if not any(name.endswith("Strategy") for name in drivers):  # STRATEGY, or one that a lab derives from it
        raise ConfigError(f"{where}: targets.main.drivers has no {STRATEGY}", f"add `- {STRATEGY}: {{}}`")
    if MODULE not in modules and (STRATEGY in drivers or not modules):
        raise ConfigError(f"{where}: imports has no {MODULE}", f"add `imports: [{MODULE}]`")
    if not isinstance(_inside(document, "options").get(DEVICE_OPTION), str):
        raise ConfigError(f"{where}: options.{DEVICE_OPTION} is missing", "name the device of the fleet that it is")
    return target


def _inside(document: Any, *names: str) -> dict[str, Any]:
    """A mapping in another; empty if it is not there."""
    for name in names:
        document = document.get(name) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _named(entries: Any) -> set[str]:
    """Names of drivers, or resources: labgrid takes a mapping, or a list of mappings."""
    listed = entries if isinstance(entries, list) else [entries]
    return {name for entry in listed if isinstance(entry, dict) for name in entry}


def _ask_coordinator(address: str, file: Path) -> None:
    host, _, port = address.partition(":")
    remedy = f"start it, or say where it is: LG_COORDINATOR=HOST:PORT, or coordinator_address below options in {file}"
    try:
        socket.create_connection((host, int(port or COORDINATOR.partition(":")[2])), _PATIENCE_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: no labgrid coordinator answers at {address}: {error}", remedy) from error


def _check_power(power: str) -> None:
    """See that it is a driver, which needs to be told nothing."""
    import labgrid.driver  # noqa: F401 - so that the factory knows them
    from labgrid.factory import target_factory

    driver = target_factory.drivers.get(power)
    if driver is None:
        raise ConfigError(f"--power: labgrid has no driver {power!r}", "name one of its, such as NetworkPowerDriver")
    needs = [field.name for field in attr.fields(driver) if field.init and field.default is attr.NOTHING]
    if missing := [name for name in needs if name not in ("target", "name")]:
        raise ConfigError(
            f"--power: {power} has to be told {', '.join(missing)}", "leave --power out, and write it into the files"
        )
