"""Draws Emoji-8: emoji of eight groups as eight sets of vendors' art show them, in 32 by 32 pixels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import UNDECODABLE, DataError
from fleetune.edge.protocol.files import read_bytes
from fleetune.tools.assets.emoji_sets import GROUPS, SIDE, Emoji, EmojiSet, catalogue, read_set
from fleetune.tools.require import require_experiment_extra

VERSION = 1
"""Counts the changes of what `convert` writes."""

_PICTURES = "emoji-8.safetensors"
_NAMES = "emoji-8.json"
_ATTRIBUTION = "ATTRIBUTION.md"
_MAX_PICTURES = 256 << 20
_MAX_NAMES = 1 << 20
_STEP = 1000


class EmojiNames(msgspec.Struct, frozen=True):
    """What the numbers beside the pictures stand for, as ``emoji-8.json`` has it.

    Attributes:
        groups: The classes.
        vendors: Packages without their scope.
        names: Emoji.
        subjects: What emoji show that differ by gender, by number of persons, or by where they face.
        renderer: What drew them.
    """

    groups: tuple[str, ...]
    vendors: tuple[str, ...]
    names: tuple[str, ...]
    subjects: tuple[str, ...]
    renderer: str


class EmojiPictures(NamedTuple):
    """The pictures, n of them, and what each is.

    Attributes:
        images: Uint8 [n, 3, 32, 32].
        labels: Place in `EmojiNames.groups`, int64 [n].
        vendors: Place in `EmojiNames.vendors`, int64 [n].
        names: Place in `EmojiNames.names`, int64 [n].
        subjects: Place in `EmojiNames.subjects`, int64 [n].
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    vendors: NDArray[np.int64]
    names: NDArray[np.int64]
    subjects: NDArray[np.int64]


def convert(source: Path, target: Path) -> None:
    """Draws all pictures, and says on standard error how far it is.

    Args:
        source: Folder with the packages' tarballs.
        target: An empty folder, for the pictures, the names, and who drew them.

    Raises:
        AssetError: A package is damaged.
        ConfigError: What draws is not installed.
        OSError: A file cannot be written.
    """
    require_experiment_extra()
    from safetensors.numpy import save

    from fleetune.tools.assets.registry import ASSETS
    from fleetune.tools.terminal import open_console, show_steps

    sets = [read_set(source / member.file) for member in ASSETS["emoji-8"].members]
    with show_steps(open_console(stderr=True)) as say:
        pictures, names = draw(sets, catalogue(sets), say)
    (target / _PICTURES).write_bytes(save(pictures._asdict()))
    (target / _NAMES).write_bytes(msgspec.json.format(msgspec.json.encode(names), indent=1))
    drawn = Counter(pictures.vendors.tolist())
    (target / _ATTRIBUTION).write_text(
        _attribution([(emoji_set, drawn[place]) for place, emoji_set in enumerate(sets)]), encoding="utf-8"
    )


def draw(
    sets: Sequence[EmojiSet], emoji: Iterable[Emoji], say: Callable[[str], None]
) -> tuple[EmojiPictures, EmojiNames]:
    """Draws emoji on white.

    A picture of which nothing can be seen on white is left out, and so is one that is to the pixel what another of the
    same vendor is: sets give the emoji of a person and of a man one drawing.

    Args:
        sets: All sets.
        emoji: What to draw, set by set.
        say: Called with how far it is.
    """
    import resvg_py
    from PIL import Image

    images, kept = list[NDArray[np.uint8]](), list[Emoji]()
    seen = set[tuple[int, bytes]]()
    for count, one in enumerate(emoji):
        if count % _STEP == 0:
            say(f"emoji-8: draws {sets[one.vendor].vendor}, {count} pictures so far")
        # Text would need this machine's fonts, so another machine would draw something else.
        png = resvg_py.svg_to_bytes(svg_string=one.svg, background="#ffffff", skip_system_fonts=True)
        image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.uint8)
        shown = one.vendor, image.tobytes()
        if (image == 255).all() or shown in seen:
            continue
        seen.add(shown)
        images.append(image.transpose(2, 0, 1))
        kept.append(one)
    names = sorted({one.name for one in kept})
    subjects = sorted({one.subject for one in kept})
    name_places = {name: place for place, name in enumerate(names)}
    subject_places = {subject: place for place, subject in enumerate(subjects)}
    pictures = EmojiPictures(
        images=np.ascontiguousarray(np.stack(images)),
        labels=np.array([one.group for one in kept], dtype=np.int64),
        vendors=np.array([one.vendor for one in kept], dtype=np.int64),
        names=np.array([name_places[one.name] for one in kept], dtype=np.int64),
        subjects=np.array([subject_places[one.subject] for one in kept], dtype=np.int64),
    )
    renderer = f"resvg {resvg_py.__resvg_version__}, resvg-py {version('resvg-py')}"
    vendors = tuple(emoji_set.vendor for emoji_set in sets)
    return pictures, EmojiNames(GROUPS, vendors, tuple(names), tuple(subjects), renderer)


def read_emoji(directory: Path) -> tuple[EmojiPictures, EmojiNames]:
    """Reads the pictures.

    Args:
        directory: What ``fetch("emoji-8")`` returned.

    Raises:
        DataError: A file is missing, damaged, too large or not of the expected form.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    remedy = f"delete {directory} and fetch the data set again"
    try:
        names = msgspec.json.decode(read_bytes(directory / _NAMES, _MAX_NAMES), type=EmojiNames)
        pictures = EmojiPictures(**load(read_bytes(directory / _PICTURES, _MAX_PICTURES)))
    except (OSError, SafetensorError, TypeError, *UNDECODABLE) as error:
        raise DataError(f"{directory} holds no Emoji-8: {error}", remedy) from error
    rows = len(pictures.labels)
    numbered = (
        (pictures.labels, names.groups),
        (pictures.vendors, names.vendors),
        (pictures.names, names.names),
        (pictures.subjects, names.subjects),
    )
    fits = pictures.images.dtype == np.uint8 and pictures.images.shape == (rows, 3, SIDE, SIDE)
    for column, meanings in numbered:
        fits &= column.dtype == np.int64 and column.shape == (rows,) and set(column.tolist()) <= {*range(len(meanings))}
    if not fits:
        raise DataError(f"{directory} holds an Emoji-8 whose numbers do not fit its names", remedy)
    return pictures, names


def _attribution(sets: Iterable[tuple[EmojiSet, int]]) -> str:
    """Who drew the pictures of each set, in Markdown."""
    lines = [
        "# Who drew Emoji-8",
        "",
        "Each picture is an emoji of one of these sets, drawn in 32 by 32 pixels on white and otherwise unchanged.",
        "It has the licence of its set.",
    ]
    for emoji_set, count in sets:
        info = emoji_set.info
        lines += [
            "",
            f"## {info.name} (`{emoji_set.vendor}`)",
            "",
            f"- {count} pictures, from the npm package {emoji_set.package}",
            f"- author: {info.author.name}, {info.author.url}",
            f"- licence: {info.license.title} ({info.license.spdx}), {info.license.url}",
        ]
    return "\n".join(lines) + "\n"
