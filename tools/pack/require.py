"""Says what to install when a command needs more than the plain install."""

from __future__ import annotations

from importlib.util import find_spec

from fleetune.edge.protocol.errors import ConfigError, install_hint


def require_pack_extra() -> None:
    """Check that torch and its companions are installed.

    Raises:
        ConfigError: One of them is missing.
    """
    missing = [
        name for name in ("torch", "transformers", "optimum", "bitsandbytes", "onnx", "rich") if not find_spec(name)
    ]
    if missing:
        raise ConfigError(f"this command needs {', '.join(missing)}", f"{install_hint('pack')}, on a workstation")
