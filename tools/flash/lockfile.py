"""What a device installs, by version and hash: ``device.lock``, for one tier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from packaging.requirements import InvalidRequirement, Requirement

from fleetune.edge.protocol.errors import AssetError
from fleetune.tools.flash.tier import Tier

LOCK = "device.lock"

_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_REMEDY = "install Fleetune anew"


@dataclass(frozen=True)
class Pin:
    """One package.

    Attributes:
        name: In lower case.
        version: The only one that is taken.
        hashes: SHA-256 of each file that may be taken for it, on whatever system.
    """

    name: str
    version: str
    hashes: frozenset[str]


def read_lock(text: str, tier: Tier) -> dict[str, Pin]:
    """Name → what a tier's devices install.

    Args:
        text: Requirements as pip reads them, each with hashes.
        tier: Whose markers hold.

    Raises:
        AssetError: A line is none, or has no hash.
    """
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words, hashes = line.partition(" --hash")[0].strip(), frozenset(_HASH.findall(line))
        try:
            wanted = Requirement(words)
        except InvalidRequirement as error:
            raise AssetError(f"{LOCK}: {words!r} is no requirement: {error}", _REMEDY) from error
        if not hashes:
            raise AssetError(f"{LOCK}: {words} has no hash", _REMEDY)
        name = wanted.name.lower()
        if name not in tier.unused and (wanted.marker is None or wanted.marker.evaluate(tier.environment)):
            found[name] = Pin(name, str(wanted.specifier).removeprefix("=="), hashes)
    return found


def locked(tier: Tier) -> dict[str, Pin]:
    """Name → what this tier's devices install, as this version of Fleetune has it.

    Raises:
        AssetError: The lock file is damaged.
    """
    return read_lock((resources.files("fleetune.tools.flash") / LOCK).read_text(encoding="utf-8"), tier)
