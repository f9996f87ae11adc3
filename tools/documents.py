"""Small JSON files that have a schema: written alike, and read with the field that does not fit it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError, field_and_reason

T = TypeVar("T", bound=msgspec.Struct)


def to_json(value: msgspec.Struct) -> bytes:
    """A struct as a file that people can read."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def from_json(raw: bytes, kind: type[T], where: str, remedy: str) -> T:
    """Read one.

    Args:
        raw: Its content, of which the size was checked.
        kind: What it has to be.
        where: What an error calls it.
        remedy: What to do where it is not.

    Raises:
        ConfigError: It does not fit the schema.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNDECODABLE as error:
        field, reason = field_and_reason(error)
        raise ConfigError(f"{where}{f': field {field}' if field else ''}: {reason}", remedy) from error
