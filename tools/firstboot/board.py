"""The board that starts for the first time: where its files are, and which steps are behind it."""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fleetune.edge.protocol.files import read_bytes, write_atomic
from fleetune.edge.protocol.identity.folder import write_private
from fleetune.profiles.fleet import Fleet, read_fleet
from fleetune.tools.documents import from_json, to_json
from fleetune.tools.firstboot.seed import FLEET_FILE, SEED_FILE, TOKEN_FILE, Seed, read_seed
from fleetune.tools.places import STATE

JOURNAL = "firstboot.json"
PROVISIONED = "provisioned"
"""A board with this file is a member of its fleet; its agent starts, and first boot no more."""

_SERIALS = ("proc/device-tree/serial-number", "sys/class/dmi/id/product_serial")
_MAX_JOURNAL = 1 << 16


class _Journal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    done: dict[str, str]


@dataclass(frozen=True)
class Board:
    """A board, or a folder that looks like one.

    Attributes:
        root: What ``/`` is.
        user: Who the agent runs as, and whose its state is; None for whoever runs this.
    """

    root: Path
    user: str | None = None

    @property
    def state(self) -> Path:
        """The agent's state folder."""
        return self.root / STATE

    @property
    def own(self) -> Path:
        """What the board has taken of its seed."""
        return self.state / "board"

    @property
    def serial(self) -> str | None:
        """The board's serial number, if it tells one."""
        for name in _SERIALS:
            file = self.root / name
            if file.is_file() and (text := file.read_bytes()[:256].strip(b"\0\n ").decode("ascii", "replace")):
                return text
        return None

    @property
    def seed(self) -> Seed:
        """The seed that was taken.

        Raises:
            ConfigError: It is damaged.
        """
        file = self.own / SEED_FILE
        return read_seed(read_bytes(file, 1 << 16), str(file))

    @property
    def fleet_file(self) -> Path:
        """The fleet file that came with it."""
        return self.own / FLEET_FILE

    @property
    def fleet(self) -> Fleet:
        """What it says.

        Raises:
            ConfigError: It is damaged.
        """
        return read_fleet(self.fleet_file)

    @property
    def token(self) -> Path:
        """The token, until it is used."""
        return self.own / TOKEN_FILE

    def keep(self, name: str, content: bytes) -> None:
        """Write a file of the board's own, for the agent's eyes alone."""
        write_private(self.own / name, content)
        self.give(self.own)
        self.give(self.own / name)

    def give(self, path: Path) -> None:
        """Make a path the agent's."""
        if self.user is not None:
            shutil.chown(path, self.user, pwd.getpwnam(self.user).pw_gid)

    # --- which steps are done -----------------------------------------------------------------------------------

    def done(self) -> dict[str, str]:
        """Step → what came of it.

        Raises:
            ConfigError: The journal is damaged.
        """
        file = self.state / JOURNAL
        try:
            raw = read_bytes(file, _MAX_JOURNAL)
        except FileNotFoundError:
            return {}
        return from_json(raw, _Journal, str(file), f"remove {file}: what is done is seen to be done, and kept").done

    def finish(self, step: str, came: str) -> None:
        """Remember that a step is done, through a power cut too."""
        journal = _Journal(1, self.done() | {step: came})
        write_atomic(self.state / JOURNAL, to_json(journal))


def as_user(board: Board) -> dict[str, Any]:
    """What `subprocess` needs to run something as the agent's user; nothing where that is who runs this already."""
    if board.user is None or os.geteuid() == pwd.getpwnam(board.user).pw_uid:
        return {}
    group = pwd.getpwnam(board.user).pw_gid
    bytecode = str(board.root / "var/cache/fleetune/agent")
    env = os.environ | {"HOME": str(board.state), "PYTHONPYCACHEPREFIX": bytecode}
    return {"user": board.user, "group": group, "extra_groups": [], "env": env}
