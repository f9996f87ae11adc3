"""What a board runs, what it tries, and what it never takes again; with the links that say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from fleetune.edge.protocol.files import make_folder, read_bytes, sync_folder, write_atomic
from fleetune.tools.documents import from_json, to_json

FILE, CURRENT, GOOD, PACKS = "state.json", "current", "good", "packs"

_MAX = 1 << 20
_Number = Annotated[int, msgspec.Meta(ge=0)]
_Link = Annotated[str, msgspec.Meta(max_length=300)]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a board's releases.

    Attributes:
        schema: Version of this layout.
        good: Number of the release that runs well; 0 for what the image came with.
        trying: Number of the release that is being tried; 0 for none.
        before: While one is tried, each link that it changes → where it led; empty for nowhere.
        after: The same links → where they lead with it.
        started: Whether the agent was started with it.
        bad: Numbers of those that did not come up. The one that is tried is among them while the board goes back.
    """

    schema: int = 1
    good: _Number = 0
    trying: _Number = 0
    before: dict[str, _Link] = {}
    after: dict[str, _Link] = {}
    started: bool = False
    bad: tuple[_Number, ...] = ()


def read_state(folder: Path) -> State:
    """What is kept there; as if nothing had been taken where there is nothing.

    Raises:
        ConfigError: It is damaged.
    """
    file = folder / FILE
    try:
        raw = read_bytes(file, _MAX)
    except FileNotFoundError:
        return State()
    return from_json(raw, State, str(file), f"remove {file}: the newest release is then taken anew")


def write_state(folder: Path, state: State) -> None:
    """Keep it, through a power cut too."""
    write_atomic(folder / FILE, to_json(state))


def where(folder: Path, link: str) -> str:
    """Where a link leads; empty if it is not there."""
    path = folder / link
    return str(path.readlink()) if path.is_symlink() else ""


def point(folder: Path, link: str, target: str) -> None:
    """Let a link lead somewhere else, at once; nowhere removes it."""
    path = folder / link
    make_folder(path.parent)
    if not target:
        path.unlink(missing_ok=True)
    else:
        scratch = path.with_name(f".{path.name}.new")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(target)
        scratch.replace(path)
    sync_folder(path.parent)
