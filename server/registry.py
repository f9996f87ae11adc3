"""Which devices the fleet has, and where each stands."""

from __future__ import annotations

import math
import time

import msgspec

from fleetune.edge.protocol.messages import Presence, PresenceState
from fleetune.server.store import Store

_MOST = 10_000
"""Devices of a fleet that takes any."""

_OUTLIVED: dict[PresenceState, PresenceState] = {"failed": "offline", "declined": "idle"}
"""What a retained state means to an aggregator that has just come."""


class Registry:
    """The newest presence of every device.

    Args:
        expected: Ids of the fleet's devices; empty to take any.

    Attributes:
        kept_out: Device in quarantine → why.
        revoked: Devices whose credentials do not count any more.
    """

    def __init__(self, expected: frozenset[str]) -> None:
        self._expected = expected
        self._presence: dict[str, Presence] = {}
        # Device that is away → since when, by the monotonic clock; infinite while nobody could have told.
        self._gone: dict[str, float] = {}
        self._unsaved: set[str] = set()
        self._members: frozenset[str] | None = None  # until somebody comes, goes, or fails
        self._falls: dict[str, int] = {}  # device → how often its boot counter fell
        self.kept_out: dict[str, str] = {}
        self.revoked: frozenset[str] = frozenset()

    def update(self, presence: Presence, *, retained: bool = False) -> bool:
        """Take a presence message; False if it is from an unknown device, or the late Will of another boot.

        Args:
            presence: The message.
            retained: Whether the broker kept it from before this side connected. A device that failed then may have
                been mended since, so it counts as away; what it declined then was another aggregator's.
        """
        known = self._presence.get(presence.name)
        if not self.may_take_part(presence.name):
            return False
        if not self._expected and known is None and len(self._presence) >= _MOST:
            return False
        if known is not None and presence.state == "offline" and presence.boot != known.boot:
            return False
        if retained and known is None and presence.state in _OUTLIVED:
            presence = msgspec.structs.replace(presence, state=_OUTLIVED[presence.state])
        if known is not None and presence.boot < known.boot:
            self._falls[presence.name] = self._falls.get(presence.name, 0) + 1
        self._presence[presence.name] = presence
        self._members = None
        self._unsaved.add(presence.name)
        if presence.state == "offline":
            self._gone.setdefault(presence.name, time.monotonic())
        else:
            self._gone.pop(presence.name, None)
        return True

    def expect_anew(self) -> None:
        """Another job begins; it may suit those who declined the one before."""
        for name, presence in self._presence.items():
            if presence.state == "declined":
                self._presence[name] = msgspec.structs.replace(presence, state="idle")
        self._members = None

    def doubt(self) -> None:
        """The connection has broken: who was there may go, and nobody would tell."""
        for name in self._presence:
            self._gone.setdefault(name, math.inf)

    def trust(self) -> None:
        """The connection is back: who is there is heard of soon; for others the time runs from now on."""
        now = time.monotonic()
        self._gone = {name: min(since, now) for name, since in self._gone.items()}

    def may_take_part(self, device: str) -> bool:
        """Whether the fleet file names a device, or there is none."""
        return not self._expected or device in self._expected

    def knows(self, device: str) -> bool:
        """Whether a device belongs to the fleet."""
        return device in self._expected if self._expected else device in self._presence

    def members(self) -> frozenset[str]:
        """Devices that a round waits for: those expected or seen, less those that failed, declined or are out."""
        if self._members is None:
            known = self._expected or {name for name, there in self._presence.items() if there.state != "offline"}
            self._members = frozenset(name for name in known if self.lost(name) is None)
        return self._members

    def here(self, patience: float) -> set[str]:
        """Devices that are connected, or have been gone for less than ``patience`` seconds."""
        now = time.monotonic()
        return {name for name in self._presence if now - self._gone.get(name, now) < patience}

    def is_here(self, name: str) -> bool:
        """Whether a device is connected, as far as anybody told."""
        presence = self._presence.get(name)
        return presence is not None and presence.state != "offline"

    def is_shared(self, name: str) -> bool:
        """Whether two agents take turns under one id. A boot counter falls where a board was flashed anew, but once."""
        return self._falls.get(name, 0) > 1

    def save(self, store: Store) -> None:
        """Keep what is new."""
        if self._unsaved:
            said = (self._unsaved - self.revoked) & self._presence.keys()
            store.see((self._presence[name] for name in said), time.time())
            store.shut_out(self._unsaved & self.revoked)
            self._unsaved.clear()

    def keep_out(self, device: str, why: str) -> None:
        """Wait for a device no more, whatever it says."""
        self.kept_out[device] = why
        self._members = None

    def let_in(self, device: str) -> None:
        """Wait for it again."""
        self.kept_out.pop(device, None)
        self._members = None

    def shut_out(self, revoked: frozenset[str]) -> None:
        """Wait for these devices no more, and again for those that were revoked and are not any more."""
        self._unsaved |= revoked - self.revoked
        self.revoked, self._members = revoked, None

    @property
    def out(self) -> frozenset[str]:
        """Devices that take no part, whatever they say."""
        return self.revoked.union(self.kept_out)

    def ready(self) -> set[str]:
        """Devices that are connected, have not failed, and are not out."""
        there = {name for name, presence in self._presence.items() if presence.state not in ("offline", "failed")}
        return there - self.out

    def lost(self, device: str) -> str | None:
        """Why a device failed, declined or is out, or None if it did nothing of that."""
        if device in self.revoked:
            return "revoked"
        if device in self.kept_out:
            return f"quarantined: {self.kept_out[device]}"
        presence = self._presence.get(device)
        return presence.detail if presence is not None and presence.state in ("failed", "declined") else None

    def describe(self, device: str) -> str:
        """A device and what it does, for people."""
        presence = self._presence.get(device)
        return f"{device} ({f'{presence.state}: {presence.detail}' if presence else 'never seen'})"

    def losses(self) -> dict[str, str]:
        """Device → why it failed, declined or is out."""
        known = sorted(self._presence.keys() | (device for device in self.out if self.knows(device)))
        return {name: reason for name in known if (reason := self.lost(name)) is not None}
