"""The agent's service on a board, as systemd has it."""

from __future__ import annotations

from typing import Literal, Protocol

from fleetune.tools.places import AGENT
from fleetune.tools.programs import find_program, run_program

Health = Literal["up", "waits", "starting", "down"]

_RESTARTS = 3
"""So many by itself, and it does not come up."""


class Service(Protocol):
    """What an update does to the agent, and asks of it."""

    def restart(self) -> None:
        """Start it anew; returns at once."""

    def health(self) -> Health:
        """``up``; ``waits``: for the broker, which says nothing about the kit; ``starting``; or ``down``."""


class Systemd:
    """The agent's unit."""

    def restart(self) -> None:
        """Start it anew; its count of restarts begins at none."""
        program = _systemctl()
        run_program([program, "reset-failed", AGENT], "see journalctl -u fleetune-agent", fine=range(256))
        run_program([program, "--no-block", "restart", AGENT], "see journalctl -u fleetune-agent")

    def health(self) -> Health:
        """As systemd says."""
        names = ("ActiveState", "StatusText", "NRestarts", "Job")
        said = run_program([_systemctl(), "show", AGENT, f"--property={','.join(names)}"], "see systemctl status")
        found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        if found.get("ActiveState") == "failed" or int(found.get("NRestarts") or 0) >= _RESTARTS:
            return "down"
        if found.get("ActiveState") == "active":
            return "starting" if found.get("Job") else "up"  # systemd has not stopped the old one yet
        return "waits" if found.get("StatusText", "").startswith("waits for the broker") else "starting"


def _systemctl() -> str:
    return find_program("systemctl", "systemd")
