"""Pictures of 32 by 32 pixels in three colours, dealt out to clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import ConfigError
from fleetune.tools.assets import fetch
from fleetune.tools.assets.datasets import read_fashion_mnist
from fleetune.tools.assets.emoji import read_emoji
from fleetune.tools.experiment import splits
from fleetune.tools.experiment.base import Client, Federation, Samples
from fleetune.tools.experiment.cifar import read_cifar
from fleetune.tools.experiment.splits import TEST_SHARE, Rows
from fleetune.tools.pack.extractors import SIDE

DATA = ("fashion-mnist", "emoji-8")
"""Data sets that are known by name; any other word is a folder with CIFAR-10 or CIFAR-100."""

SPLITS = ("pathological", "dirichlet", "natural")
"""How samples can be dealt out."""


class Origins(NamedTuple):
    """Where samples come from that several sources have of the same subjects.

    Attributes:
        sources: Name of each source.
        source: Place in `sources` of each sample, int64 [n].
        subject: What each shows, int64 [n].
    """

    sources: tuple[str, ...]
    source: NDArray[np.int64]
    subject: NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """A data set before it is dealt out.

    Attributes:
        data: What it is called.
        classes: How many.
        images: Uint8 [n, 3, 32, 32], or grey [n, h, w] with sides of at most 32.
        labels: Class of each, int64 [n].
        origins: Where each comes from, if that is known.
    """

    data: str
    classes: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    origins: Origins | None = None

    def take(self, rows: Rows) -> Samples:
        """Some of the samples; smaller pictures get a margin of zeros, grey ones three equal colours."""
        images = self.images[rows]
        if images.ndim == 3:
            missing = [SIDE - side for side in images.shape[1:]]
            images = np.pad(images, ((0, 0), *((lack // 2, lack - lack // 2) for lack in missing)))
            images = np.repeat(images[:, None], 3, axis=1)
        return Samples(images, self.labels[rows])


def read_pictures(data: str, *, cache: Path | None = None) -> Pictures:
    """Reads a data set, and brings it first if it has a name and is not in the cache.

    Args:
        data: One of `DATA`, or the folder of CIFAR-10 or CIFAR-100 in the form for Python.
        cache: The cache's folder, if not the usual one.

    Raises:
        ConfigError: There is neither a data set nor a folder of that name, or what draws Emoji-8 is not installed.
        AssetError: The data set cannot be had, or is not the one that is pinned.
        DataError: A file is missing, or is not what it should be.
    """
    if data == "fashion-mnist":
        return fashion_mnist(fetch(data, cache=cache))
    if data == "emoji-8":
        return emoji_8(fetch(data, cache=cache))
    if not Path(data).is_dir():
        raise ConfigError(
            f"there is neither a data set nor a folder {data!r}",
            f"choose {' or '.join(DATA)}, or name a folder with CIFAR-10 or CIFAR-100 for Python",
        )
    return Pictures(*read_cifar(Path(data)))


def fashion_mnist(directory: Path) -> Pictures:
    """All pictures of Fashion-MNIST, those to learn from first.

    Args:
        directory: What ``fetch("fashion-mnist")`` returned.

    Raises:
        DataError: A file is missing, or is not what it should be.
    """
    parts = [read_fashion_mnist(directory, part) for part in ("train", "t10k")]
    images, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
    return Pictures("fashion-mnist", 10, images, labels.astype(np.int64))


def emoji_8(directory: Path) -> Pictures:
    """All pictures of Emoji-8; each vendor is a source.

    Args:
        directory: What ``fetch("emoji-8")`` returned.

    Raises:
        DataError: A file is missing, or is not what it should be.
    """
    pictures, names = read_emoji(directory)
    origins = Origins(names.vendors, pictures.vendors, pictures.subjects)
    return Pictures("emoji-8", len(names.groups), pictures.images, pictures.labels, origins)


def deal(
    pictures: Pictures,
    split: str,
    *,
    clients: int | None = None,
    seed: int = 0,
    batch: int = 64,
    each: int = 2,
    alpha: float = 0.5,
    limit: int | None = None,
) -> Federation:
    """Deals a data set out to clients, and each client's samples 8 to 2 into what it learns from and is measured by.

    Where subjects are known, the subjects to measure by are chosen once for all clients; for one seed they are the same
    in every split.

    Args:
        pictures: The data set.
        split: One of `SPLITS`.
        clients: How many; `natural` has as many as there are sources.
        seed: Of everything that is drawn.
        batch: Samples of a step: a client learns from as many at least.
        each: Classes of a client in `pathological`.
        alpha: Concentration in `dirichlet`: the smaller, the more clients differ.
        limit: Samples that a client keeps at most, of both kinds together.

    Raises:
        ConfigError: A number does not fit the data, or a client would have one class, fewer samples to learn from than
            a batch, or none to measure by.
    """
    if seed < 0:
        raise ConfigError(f"the seed is {seed}", "choose a seed of 0 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit} samples a client", "choose a limit of at least a batch")
    # One stream for each draw: so a limit changes nothing of what it limits.
    choice, dealing, thinning = (np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3))
    labels, origins = pictures.labels, pictures.origins
    tests = splits.held_out_subjects(origins.subject, labels, choice) if origins else None
    names = _names(pictures, split, clients)
    if split == "pathological":
        dealt = splits.pathological(labels, len(names), dealing, each=each)
    elif split == "dirichlet":
        least = int(np.ceil(batch / (1 - TEST_SHARE)))
        dealt = splits.dirichlet(labels, len(names), dealing, alpha=alpha, least=least)
    else:
        assert origins is not None
        dealt = splits.natural(origins.source)
    parts = list[tuple[Rows, Rows]]()
    for name, rows in zip(names, dealt, strict=True):
        out = splits.held_out(labels[rows], choice) if tests is None else tests[rows]
        train, test = rows[~out], rows[out]
        if limit is not None:
            measure = round(limit * TEST_SHARE)
            train = splits.thinned(train, labels, limit - measure, thinning)
            test = splits.thinned(test, labels, measure, thinning)
        _check(name, labels[train], len(test), batch)
        parts.append((train, test))
    return Federation(
        pictures.data,
        split,
        pictures.classes,
        tuple(
            Client(name, pictures.take(train), pictures.take(test))
            for name, (train, test) in zip(names, parts, strict=True)
        ),
    )


def _names(pictures: Pictures, split: str, clients: int | None) -> tuple[str, ...]:
    """What the clients are called.

    Raises:
        ConfigError: There is no such split, or not of these data or for so many clients.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}", f"choose one of {', '.join(SPLITS)}")
    if split != "natural":
        if clients is None or clients < 1:
            raise ConfigError(f"the split {split} cannot be made for {clients or 'no'} clients", "ask for 1 or more")
        return tuple(f"client-{place}" for place in range(1, clients + 1))
    if pictures.origins is None:
        others = " or ".join(other for other in SPLITS if other != split)
        raise ConfigError(f"nobody knows where the samples of {pictures.data} come from", f"choose {others}")
    sources = pictures.origins.sources
    if clients not in (None, len(sources)):
        raise ConfigError(
            f"{pictures.data} comes from {len(sources)} sources, which are no {clients} clients",
            f"ask for {len(sources)} clients, or choose another split",
        )
    return sources


def _check(name: str, labels: NDArray[np.int64], test: int, batch: int) -> None:
    """Refuses a client that could not learn, or not be measured."""
    classes = len(np.unique(labels))
    of = f"{classes} class{'' if classes == 1 else 'es'}"
    has = f"{name} has {len(labels)} samples to learn from, of {of}, and {test} to measure by"
    remedy = "ask for fewer clients, raise the limit if there is one, or choose another seed or split"
    if len(labels) < batch:
        raise ConfigError(f"{has}: that is less than a batch of {batch}", f"make the batch smaller, or {remedy}")
    if classes < 2:
        raise ConfigError(f"{has}: with one class there is nothing to learn", remedy)
    if not test:
        raise ConfigError(f"{has}: its accuracy would be unknown", remedy)
