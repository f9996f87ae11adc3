"""Says what to install when a command needs more than the plain install."""

from __future__ import annotations

from importlib.util import find_spec

from fleetune.edge.protocol.errors import ConfigError, install_hint

_PACK = ("torch", "transformers", "optimum", "bitsandbytes", "onnx", "rich")
_EXPERIMENT = ("resvg_py", "PIL", "rich")
_FLASH = ("cyclonedx", "packaging")
_HIL = ("labgrid", "pytest", "jinja2")
_SERVER = ("iotcore", "jinja2", "matplotlib", "rich")


def require_pack_extra() -> None:
    """Check that torch and its companions are installed.

    Raises:
        ConfigError: One of them is missing.
    """
    _require(_PACK, "pack")


def require_server_extra() -> None:
    """Check that the embedded broker, tables and plots are installed, for a command that packs later.

    Raises:
        ConfigError: One of them is missing.
    """
    _require(_SERVER, "all")


def require_experiment_extra() -> None:
    """Check that what draws pictures is installed.

    Raises:
        ConfigError: A package is missing.
    """
    _require(_EXPERIMENT, "experiment")


def require_flash_extra() -> None:
    """Check that what builds images is installed.

    Raises:
        ConfigError: A package is missing.
    """
    _require(_FLASH, "flash")


def require_hil_extra() -> None:
    """Check that labgrid is installed.

    Raises:
        ConfigError: A package is missing.
    """
    _require(_HIL, "hil")


def require_accountant() -> None:
    """Check that privacy can be accounted for.

    Raises:
        ConfigError: A package is missing.
    """
    _require(("dp_accounting",), "server")


def require_all_extras() -> None:
    """Check that both are installed.

    Raises:
        ConfigError: A package is missing.
    """
    _require(_PACK + _SERVER, "all")


def _require(packages: tuple[str, ...], extra: str) -> None:
    missing = [name for name in dict.fromkeys(packages) if not find_spec(name)]
    if missing:
        raise ConfigError(f"this command needs {', '.join(missing)}", f"{install_hint(extra)}, on a workstation")
