"""A board's declared limits."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fleetune.edge.protocol.errors import ConfigError
from fleetune.profiles.yamlfile import Size, read_yaml


class Processor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The CPU."""

    cores: Annotated[int, msgspec.Meta(ge=1)]
    core: str
    architecture: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of board.

    Attributes:
        schema: Version of this layout.
        name: What fleet files call it; also its file's name.
        board: What its maker calls it.
        tier: Platform tier, ``t1`` to ``t4``.
        memory: All of its memory, shared with the GPU where there is one.
        processor: Its CPU.
        sources: Field → where the value is from.
    """

    schema: Literal[1]
    name: str
    board: str
    tier: Literal["t1", "t2", "t3", "t4"]
    memory: Size
    processor: Processor
    sources: dict[str, str]


def profile_names() -> list[str]:
    """Names of the profiles that Fleetune ships."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in resources.files("fleetune.profiles").iterdir()
        if file.name.endswith(".yaml")
    )


def read_profile(name: str) -> Profile:
    """Read a shipped profile by its name, or any file by its path (with a ``/`` or ``.yaml`` in it).

    Raises:
        ConfigError: There is no such profile, or it does not fit the schema.
    """
    remedy = "see profiles/jetson-nano-2gb.yaml for an example"
    if "/" in name or name.endswith(".yaml"):
        return read_yaml(Path(name), Profile, remedy).value
    if name in profile_names():
        with resources.as_file(resources.files("fleetune.profiles") / f"{name}.yaml") as file:
            return read_yaml(file, Profile, remedy).value
    raise ConfigError(f"profile: {name!r} is unknown", f"use a path, or one of {', '.join(profile_names())}")
