"""What a seed holds: all that makes a board itself, and not like any other of its fleet."""

from __future__ import annotations

from pathlib import Path as Folder
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.messages import Name
from fleetune.profiles.fleet import PROFILE_ENDING
from fleetune.tools.documents import from_json, to_json

LABEL = "FLEETSEED"
"""Name of a file system that holds a seed."""

SEED_FILE = "seed.json"
TOKEN_FILE = "token"  # noqa: S105 - a file's name
FLEET_FILE = "fleet.yaml"
RELEASES_FILE = "releases.root.json"
"""Whom a board believes when it looks for releases: root metadata of The Update Framework."""


SOON_S = 600.0
"""Seconds before its end from which a token is as good as ended."""

MAX_FILE = 1 << 16
"""Bytes of each file of a seed."""

Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\n\0]{0,4000}\Z")]


class Seed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``seed.json``; beside it lie the device's own fleet file with its profile, and a token that counts once.

    Attributes:
        schema: Version of this layout.
        fleet: Name of the fleet.
        device: Id that the board gets.
        broker: Address of the fleet's broker.
        pack: Where the pack is on the board.
        data: Where the board's samples are, once there are some.
        releases: Where releases are served, if they are.
        serial: The only board that may take this seed; any may where there is none.
    """

    schema: Literal[1]
    fleet: Name
    device: Name
    broker: Annotated[str, msgspec.Meta(max_length=300)]
    pack: Path
    data: Path
    releases: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s]{1,300}\Z")] | None = None
    serial: Annotated[str, msgspec.Meta(max_length=64)] | None = None


def seed_files(folder: Folder) -> list[str]:
    """Names of a seed's files in a folder, which may hold others; ``seed.json`` is the last: with it all is there."""
    profiles = sorted(file.name for file in folder.glob(f"[!.]*{PROFILE_ENDING}"))
    names = (*profiles, FLEET_FILE, RELEASES_FILE, TOKEN_FILE, SEED_FILE)
    return [name for name in names if (folder / name).is_file()]  # a token that was used is gone


def write_seed(seed: Seed) -> bytes:
    """The file's content."""
    return to_json(seed)


def read_seed(raw: bytes, where: str) -> Seed:
    """Read ``seed.json``.

    Args:
        raw: Its content.
        where: What an error calls it.

    Raises:
        ConfigError: It does not fit the schema.
    """
    return from_json(raw, Seed, where, "make the seed anew: `fleetune flash seed`")
