"""Topic names. Every topic below ``up`` and ``st`` carries the id of the only device that may write it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.messages import NAME

PROTOCOL = 1
_NUMBER = re.compile(r"[0-9]{1,6}")
_LEVELS = re.compile(r"[A-Za-z0-9_-]{1,96}(/[A-Za-z0-9_-]{1,96}){1,4}")
"""What follows the fleet's root: names, ids, hashes, numbers, verbs."""


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may stand in a topic.

    Raises:
        ConfigError: It is empty, too long, or holds a character with a meaning in topics.
    """
    if not re.match(NAME, name):
        raise ConfigError(
            f"{kind}: {name!r} is not a valid name",
            "use 1 to 64 letters, digits, '-' and '_', starting with a letter or a digit",
        )
    return name


def read_number(level: str) -> int | None:
    """The number of a chunk from its topic level, or None if it is none."""
    return int(level) if _NUMBER.fullmatch(level) else None


@dataclass(frozen=True)
class Topics:
    """The topics of one fleet."""

    fleet: str

    def __post_init__(self) -> None:
        check_name("fleet", self.fleet)

    @property
    def _root(self) -> str:
        return f"ft/{PROTOCOL}/{self.fleet}"

    def presence(self, device: str) -> str:
        """Retained presence of a device, and its Will."""
        return f"{self._root}/st/{device}"

    def introduction(self, device: str) -> str:
        """Retained credential of a device."""
        return f"{self._root}/st/{device}/id"

    @property
    def aggregator_introduction(self) -> str:
        """Retained credential of the aggregator."""
        return f"{self._root}/agg/id"

    @property
    def trust(self) -> str:
        """Retained trust document of the fleet's authority."""
        return f"{self._root}/ca/trust"

    def enrolment(self, token: str, direction: str) -> str:
        """A ``request`` of somebody with a token, or its ``reply``."""
        return f"{self._root}/enroll/{token}/{direction}"

    @property
    def aggregator_presence(self) -> str:
        """Retained presence of the aggregator, and its Will."""
        return f"{self._root}/agg/st"

    def current(self, job: str) -> str:
        """Retained announcement of a job's newest version."""
        return f"{self._root}/g/{job}/current"

    def broadcast_chunk(self, job: str, sha256: str, index: int | str) -> str:
        """One chunk of a payload that all devices need."""
        return f"{self._root}/g/{job}/{sha256}/{index}"

    def repair_chunk(self, job: str, sha256: str, index: int | str) -> str:
        """The same once more, for devices that missed it; who has it all does not listen here."""
        return f"{self._root}/g/{job}/{sha256}/r/{index}"

    def upload_manifest(self, device: str, update: str) -> str:
        """Announces an update."""
        return f"{self._root}/up/{device}/{update}/m"

    def upload_chunk(self, device: str, update: str, index: int | str) -> str:
        """One chunk of an update."""
        return f"{self._root}/up/{device}/{update}/{index}"

    def up(self, device: str, verb: str) -> str:
        """What a device asks: ``need`` for broadcast chunks that it missed, ``time``, or ``renew`` for a credential."""
        return f"{self._root}/up/{device}/{verb}"

    def down(self, device: str, verb: str) -> str:
        """What is said to one device: ``ack``, ``missing``, ``who``, ``time`` or ``renewed``."""
        return f"{self._root}/dn/{device}/{verb}"

    def split(self, topic: str) -> tuple[str, ...]:
        """The levels below the fleet's root; empty if the topic belongs elsewhere.

        Some brokers pass on any topic. A level may stand in a topic and in a path: it holds no wildcard, no ``.`` and
        no control character.
        """
        prefix = f"{self._root}/"
        rest = topic[len(prefix) :]
        return tuple(rest.split("/")) if topic.startswith(prefix) and _LEVELS.fullmatch(rest) else ()
