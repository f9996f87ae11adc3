"""Who gets which release: canaries first, then a growing share of the fleet."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.messages import Name, Sha256
from fleetune.tools.documents import from_json, to_json

FILE = "rollout.json"
"""Name of the target that says it."""

MAX_ROLLOUT = 1 << 20

_Target = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,160}\Z")]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kit or a pack.

    Attributes:
        target: Name of the archive.
        digest: SHA-256 of the tree that it unpacks to, as `tree_digest` has it.
    """

    target: _Target
    digest: Sha256


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of them; a later one takes its place.

    Attributes:
        schema: Version of this layout.
        number: Of the release; it only grows.
        kits: Tier → kit.
        packs: Name → pack.
        canaries: Devices that get it first.
        share: Share of the other devices that get it, from 0 to 1.
    """

    schema: Literal[1]
    number: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    kits: dict[Annotated[str, msgspec.Meta(pattern=r"^t[1-9]\Z")], Part]
    packs: dict[Name, Part]
    canaries: tuple[Name, ...] = ()
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0

    def reaches(self, device: str) -> bool:
        """Whether a device gets it: a canary does, others by a number that they draw, anew for each release."""
        if device in self.canaries or self.share == 1:
            return True
        drawn = hashlib.sha256(f"{self.number} {device}".encode()).digest()[:8]
        return int.from_bytes(drawn, "big") / 2**64 < self.share


def write_rollout(rollout: Rollout) -> bytes:
    """As a file."""
    return to_json(rollout)


def read_rollout(raw: bytes, where: str) -> Rollout:
    """Read one.

    Raises:
        ConfigError: It does not fit the schema.
    """
    return from_json(raw, Rollout, where, "publish it anew: `fleetune release publish`")
