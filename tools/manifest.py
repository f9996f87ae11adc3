"""What an image says of itself, ``manifest.json`` on a board: its tier and its kit."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fleetune.edge.protocol.files import read_bytes
from fleetune.tools.documents import from_json
from fleetune.tools.places import MANIFEST

_MAX = 64 << 20


class Manifest(msgspec.Struct, frozen=True):
    """The part of it that others ask for.

    Attributes:
        tier: Platform tier of the image.
        kit: Name of its kit.
    """

    tier: str
    kit: str


def read_manifest(root: Path) -> Manifest | None:
    """Of the root file system at ``root``; None where it was made without Fleetune.

    Raises:
        ConfigError: It is damaged.
    """
    file = root / MANIFEST
    try:
        raw = read_bytes(file, _MAX)
    except FileNotFoundError:
        return None
    return from_json(raw, Manifest, str(file), "unpack the overlay anew: docs/flashing.md")
