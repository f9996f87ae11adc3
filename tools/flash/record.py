"""The record of a build, which is what is signed: each file by its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import SignatureError
from fleetune.edge.protocol.files import file_sha256, read_bytes, write_atomic
from fleetune.edge.protocol.messages import Sha256
from fleetune.tools.documents import from_json, to_json

ENDING = ".build.json"

_MAX = 1 << 20
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_+.~-]{0,200}\Z")]


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was built.

    Attributes:
        schema: Version of this layout.
        fleetune: Its version.
        tier: Of the boards.
        kit: Name of the kit: the first digits of its SHA-256.
        files: Name → SHA-256 of each file beside the record.
        made_from: SHA-256 of all that the build depends on: the same needs no other build. None if nobody knows.
    """

    schema: Literal[1]
    fleetune: str
    tier: str
    kit: str
    files: dict[_FileName, Sha256]
    made_from: Sha256 | None = None


def write_record(build: Build, file: Path) -> None:
    """Write it."""
    write_atomic(file, to_json(build))


def read_record(file: Path) -> Build:
    """Read one.

    Raises:
        ConfigError: It is none.
        OSError: It cannot be read.
    """
    return from_json(read_bytes(file, _MAX), Build, str(file), "build it anew")


def check_record(file: Path) -> Build:
    """Hold the files of a build against its record.

    Raises:
        ConfigError: It is no record.
        SignatureError: A file is missing, or another.
    """
    build = read_record(file)
    for name, sha256 in build.files.items():
        path = file.parent / name
        if not path.is_file():
            raise SignatureError(f"{path} is missing", f"get it again from where {file.name} is from")
        if file_sha256(path) != sha256:
            raise SignatureError(f"{path} is not what was built", f"get it again from where {file.name} is from")
    return build
