"""What vendors of emoji call their pictures, and which of eight groups each belongs to.

The sets come as npm packages in Iconify's format: SVG bodies by name, aliases, sometimes code points, and categories.
Vendors call one emoji by different names, and some sort theirs by groups that are not Unicode's; so names are joined
over all sets first, by code point and by alias.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, AssetError
from fleetune.edge.protocol.files import read_pieces

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)
"""The classes: Unicode's groups of emoji but for flags, which vendors draw alike."""

SIDE = 32
"""Height and width of a picture, in pixels; what is not square is as high or as wide."""

_PEOPLE = GROUPS.index("People & Body")
_FILES = ("icons.json", "info.json", "metadata.json", "chars.json", "package.json")
_MAX_BYTES = 128 << 20
_TONE = re.compile(r"skin-tone|-tone\d")
_PERSONS_TONE = re.compile(r"-(medium-)?(light|dark)$|-medium$")
_WHO = re.compile(r"(^|-)((man|men|woman|women|person|people|adult|boy|girl|child)(?=-|$)|facing-right$)")


class _Icon(msgspec.Struct):
    """An SVG's content; sizes that it lacks are those of the set."""

    body: str
    hidden: bool = False
    left: float | None = None
    top: float | None = None
    width: float | None = None
    height: float | None = None


class _Alias(msgspec.Struct):
    """Another name of an icon, or of an icon that is turned or mirrored."""

    parent: str


class _Icons(msgspec.Struct):
    """``icons.json``."""

    icons: dict[str, _Icon]
    aliases: dict[str, _Alias] = {}
    left: float = 0
    top: float = 0
    width: float = 16
    height: float = 16


class _Author(msgspec.Struct):
    name: str
    url: str = ""


class _Licence(msgspec.Struct):
    title: str
    spdx: str = ""
    url: str = ""


class Info(msgspec.Struct, frozen=True):
    """``info.json``: what the set is called, who drew it, and what may be done with it."""

    name: str
    author: _Author
    license: _Licence


class _Metadata(msgspec.Struct):
    """``metadata.json``."""

    categories: dict[str, list[str]] = {}


class _Package(msgspec.Struct):
    """``package.json``."""

    name: str
    version: str


@dataclass(frozen=True)
class EmojiSet:
    """One vendor's emoji.

    Attributes:
        vendor: The package's name without its scope.
        package: The package's name and version.
        info: Author and licence.
        icons: Name → what is drawn.
        aliases: Other name → name.
        codes: Code points in hexadecimal → name; many sets have none.
        groups: Name → place in `GROUPS`; none of a set that is not sorted by Unicode's groups.
    """

    vendor: str
    package: str
    info: Info
    icons: dict[str, str]
    aliases: dict[str, str]
    codes: dict[str, str]
    groups: dict[str, int]


@dataclass(frozen=True)
class Emoji:
    """One vendor's picture of an emoji.

    Attributes:
        vendor: Place of its set.
        name: What it is called in all sets.
        subject: What it shows; the same for emoji that differ by gender, by number of persons, or by where they face.
        group: Place in `GROUPS`.
        svg: The drawing.
    """

    vendor: int
    name: str
    subject: str
    group: int
    svg: str


def read_set(path: Path) -> EmojiSet:
    """Reads a package.

    Args:
        path: Its tarball.

    Raises:
        AssetError: It is damaged, lacks a file, or a file is larger than 128 MiB or not of the expected form.
    """
    files = dict[str, bytes]()
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                stream = archive.extractfile(member) if name in _FILES and member.size <= _MAX_BYTES else None
                if stream is not None:
                    files[name] = read_pieces(stream.read, member.size)
        icons = msgspec.json.decode(files["icons.json"], type=_Icons)
        codes = msgspec.json.decode(files["chars.json"], type=dict[str, str])
        metadata = msgspec.json.decode(files["metadata.json"], type=_Metadata)
        info = msgspec.json.decode(files["info.json"], type=Info)
        package = msgspec.json.decode(files["package.json"], type=_Package)
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, *UNDECODABLE) as error:
        raise AssetError(
            f"{path} is no set of emoji in Iconify's format: {error}", "delete the file and fetch the data set again"
        ) from error
    return EmojiSet(
        vendor=package.name.rpartition("/")[2],
        package=f"{package.name}@{package.version}",
        info=info,
        icons={name: _svg(icon, icons) for name, icon in icons.icons.items() if not icon.hidden},
        aliases={name: alias.parent for name, alias in icons.aliases.items()},
        codes=codes,
        groups=_groups(metadata.categories),
    )


def catalogue(sets: Sequence[EmojiSet]) -> Iterator[Emoji]:
    """Every emoji of every set that has one of the eight groups, without those that only differ by skin tone.

    A name's group is the one that the first set has which is sorted by Unicode's groups, for all sets: newer versions
    of Unicode moved some. What no such set knows is left out.
    """
    names = _Names(sets)
    groups = dict[str, int]()
    for emoji_set in reversed(sets):
        groups |= {names.one(name): group for name, group in emoji_set.groups.items()}
    for vendor, emoji_set in enumerate(sets):
        for own_name, svg in emoji_set.icons.items():
            name = names.one(own_name)
            group = groups.get(name)
            if group is None or _TONE.search(own_name) or (group == _PEOPLE and _PERSONS_TONE.search(own_name)):
                continue
            subject = _WHO.sub("", name).strip("-") if group == _PEOPLE else name
            yield Emoji(vendor, name, f"{group}:{subject}", group, svg)


class _Names:
    """What vendors call one emoji, joined.

    Two names stay two emoji where some set draws both: ``cricket`` was the game's name before it was the insect's.

    Args:
        sets: All sets; an emoji is called what the first of them that draws it calls it.
    """

    def __init__(self, sets: Sequence[EmojiSet]) -> None:
        self._joined = dict[str, set[str]]()
        self._sets = sets
        codes = dict[str, str]()
        for emoji_set in sets:
            for code, name in emoji_set.codes.items():
                # The selector of a coloured picture is written by some and left out by others.
                self._join(codes.setdefault(code.replace("-fe0f", ""), name), name)
        for emoji_set in sets:
            for alias, name in emoji_set.aliases.items():
                self._join(name, alias)

    def one(self, name: str) -> str:
        """The name that stands for all."""
        joined = self._joined.get(name)
        if joined is None:
            return name
        drawn = (min(joined & emoji_set.icons.keys(), default=None) for emoji_set in self._sets)
        return next((first for first in drawn if first is not None), min(joined))

    def _join(self, one: str, other: str) -> None:
        ones, others = self._joined.get(one, {one}), self._joined.get(other, {other})
        if ones is others or any(ones & s.icons.keys() and others & s.icons.keys() for s in self._sets):
            return
        ones |= others
        self._joined |= dict.fromkeys(ones, ones)


def _groups(categories: dict[str, list[str]]) -> dict[str, int]:
    """Name → place in `GROUPS`, if the categories are Unicode's; some write them without the ``&``."""
    places = {group.replace(" &", ""): place for place, group in enumerate(GROUPS)}
    known = {name.replace(" &", ""): names for name, names in categories.items()}
    if not places.keys() <= known.keys():
        return {}
    return {name: place for group, place in places.items() for name in known[group]}


def _svg(icon: _Icon, icons: _Icons) -> str:
    """A whole SVG file. Its size is its own: only so a drawing that is not square stays in proportion."""
    own = (icon.left, icon.top, icon.width, icon.height)
    common = (icons.left, icons.top, icons.width, icons.height)
    box = " ".join(f"{size if value is None else value:g}" for value, size in zip(own, common, strict=True))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}" viewBox="{box}">{icon.body}</svg>'
    )
