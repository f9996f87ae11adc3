"""Where things lie on a board."""

from __future__ import annotations

from pathlib import PurePosixPath

KITS = PurePosixPath("usr/lib/fleetune")
"""Where kits lie, each in a folder named by its content: bytecode that Python keeps of one never fits another."""

AGENT, UPDATER, UPDATE_TIMER = "fleetune-agent.service", "fleetune-update.service", "fleetune-update.timer"

UNITS, TMPFILES = PurePosixPath("usr/lib/systemd/system"), PurePosixPath("usr/lib/tmpfiles.d")
WANTED = {"multi-user.target": "fleetune-firstboot.service", "timers.target": UPDATE_TIMER}
"""Unit of systemd's → the unit of ours that starts with it."""

PACKS = PurePosixPath("usr/share/fleetune/packs")
MANIFEST = PurePosixPath("usr/share/fleetune/manifest.json")

STATE = PurePosixPath("var/lib/fleetune")
"""The agent's state."""

SEED = STATE / "seed"
"""Where a board looks for its seed in its own file system."""

UPDATES = PurePosixPath("var/lib/fleetune-kits")
"""What came as an update, kits and packs: root's alone."""
