"""Builds the data files of a fleet's clients out of the fetched data sets.

Clients get data that differs as it does between real devices: by who wrote about what, or by which classes a
device sees. The same seed gives the same clients.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.files import read_pieces, write_atomic
from fleetune.tools.assets.idx import read_idx

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""The splits; a split's place in this tuple is its code in image files."""

SHARE_SIGMA = 0.3
"""Standard deviation of the noise on a film's share of fresh reviews before films are sorted.

About that of the shares themselves (0.28), so that clients' tastes differ without being pure.
"""

_REVIEWS = "rotten_tomatoes_corpus_full.csv.bz2"
_MAX_REVIEW_BYTES = 64 << 20
_LABELS = {"fresh": 1, "rotten": 0}
_IMAGE_CLASSES = 10


class TextRow(TypedDict):
    """One labelled text of a client.

    Attributes:
        text: The text.
        label: The class.
        split: What it is for.
        group: What it belongs to, a film here; rows of one group are alike.
    """

    text: str
    label: int
    split: Split
    group: str


class ImageRows(NamedTuple):
    """The images of one client.

    Attributes:
        images: uint8 [N, H, W].
        labels: int64 [N].
        splits: uint8 [N], places in `SPLITS`.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    splits: npt.NDArray[np.uint8]


class Snippet(NamedTuple):
    """A sentence or two of a film review.

    Attributes:
        text: What the critic wrote, without white space around it.
        label: 1 fresh, 0 rotten.
        film: The film's name.
    """

    text: str
    label: int
    film: str


def read_rotten_tomatoes(directory: Path) -> list[Snippet]:
    """Reads all snippets that have a label, in the file's order.

    Args:
        directory: What ``fetch("rotten-tomatoes")`` returned.

    Raises:
        DataError: The file is missing, damaged, or not of the expected form.
    """
    path = directory / _REVIEWS
    remedy = "delete the file and fetch the data set again"
    try:
        with bz2.open(path, "rb") as stream:
            content = read_pieces(stream.read, _MAX_REVIEW_BYTES + 1)
        if len(content) > _MAX_REVIEW_BYTES:
            raise DataError(f"{path} is larger than {_MAX_REVIEW_BYTES} bytes", remedy)
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
        return [
            Snippet(row["text"].strip(), _LABELS[row["category"]], row["movie_name"])
            for row in rows
            if row["category"] != "plot"
        ]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy) from error
    except (KeyError, AttributeError) as error:
        raise DataError(f"{path} has a row without a known category, text or film: {error}", remedy) from error


def rotten_tomatoes_clients(
    directory: Path, *, clients: int, train: int, val: int, test: int, seed: int
) -> list[list[TextRow]]:
    """Deals the review snippets out to clients, film by film.

    Films are sorted by their share of fresh reviews plus Gaussian noise of `SHARE_SIGMA`, then cut into
    groups of about as many snippets: so one client's films were liked and another's were not. No film belongs
    to two clients, and a text that occurs again is left out. Within a client each film belongs to one split.
    Where its films do not suffice for that, train and val may share films; test films are never seen in
    training.

    Args:
        directory: What ``fetch("rotten-tomatoes")`` returned.
        clients: How many clients.
        train: Rows for training, of each client.
        val: Rows for validation, of each client.
        test: Rows for testing, of each client.
        seed: Of the noise, the splits and the order.

    Returns:
        Each client's rows: exactly `train`, then `val`, then `test` of them.

    Raises:
        DataError: The data set cannot be read or has too few rows.
    """
    _check_counts(clients, train, val, test)
    rng = np.random.default_rng(seed)
    films: dict[str, list[Snippet]] = {}
    seen: set[str] = set()
    snippets = read_rotten_tomatoes(directory)
    for snippet in snippets:
        if snippet.text not in seen:
            seen.add(snippet.text)
            films.setdefault(snippet.film, []).append(snippet)
    wanted = {"train": train, "val": val, "test": test}
    enough = f"{clients} clients of {train} + {val} + {test} rows"
    if clients * (train + val + test) > len(seen) or clients > len(films):
        raise DataError(
            f"{enough} are more than the {len(seen)} different snippets of {len(films)} films in {directory}",
            "ask for fewer clients or fewer rows",
        )
    dealt = []
    order = _sorted_films(films, rng)
    for number, names in enumerate(_cut(order, [len(films[name]) for name in order], clients)):
        own = {name: films[name] for name in names}
        pools = _split_films(own, wanted, rng)
        if pools is None:
            rows = sum(len(group) for group in own.values())
            raise DataError(
                f"{enough} do not fit: client {number} has {rows} snippets of {len(own)} films, and test "
                "films must be unseen in training",
                "ask for fewer clients or fewer rows",
            )
        dealt.append(
            [
                TextRow(text=pool[i].text, label=pool[i].label, split=split, group=pool[i].film)
                for split, pool in pools.items()
                for i in rng.permutation(len(pool))[: wanted[split]]
            ]
        )
    return dealt


def _check_counts(clients: int, train: int, val: int, test: int) -> None:
    """Counts that make no client."""
    if clients < 1 or train < 1 or val < 0 or test < 0:
        raise DataError(
            f"{clients} clients with {train} train, {val} val and {test} test rows cannot be made",
            "ask for at least one client and one train row, and for no negative number",
        )


def _sorted_films(films: Mapping[str, list[Snippet]], rng: np.random.Generator) -> list[str]:
    """Film names by their share of fresh reviews, with noise, lowest first."""
    names = sorted(films)
    shares = np.array([np.mean([snippet.label for snippet in films[name]]) for name in names])
    order = np.argsort(shares + rng.normal(0.0, SHARE_SIGMA, len(names)), kind="stable")
    return [names[i] for i in order]


def _cut(names: list[str], sizes: list[int], groups: int) -> list[list[str]]:
    """Cuts a list into consecutive groups, none empty, of about the same sum of sizes."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    total = sum(sizes)
    cuts = [0]
    for group in range(1, groups):
        at = int(np.searchsorted(middles, total * group / groups))
        cuts.append(min(max(at, cuts[-1] + 1), len(names) - groups + group))
    return [names[start:end] for start, end in zip(cuts, [*cuts[1:], len(names)], strict=True)]


def _split_films(
    films: Mapping[str, list[Snippet]], wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[Split, list[Snippet]] | None:
    """The snippets that each split may choose from, at least as many as wanted, or None if films lack."""
    names = [list(films)[i] for i in rng.permutation(len(films))]
    pools: dict[Split, list[Snippet]] = {split: [] for split in SPLITS}
    open_splits = [split for split in SPLITS if wanted[split]]
    for name in names:  # to the split that has the least of what it wants, so every split gets many films
        poorest = min(open_splits, key=lambda split: len(pools[split]) / wanted[split])
        pools[poorest].extend(films[name])
    if all(len(pools[split]) >= wanted[split] for split in SPLITS):
        return pools
    tested: list[Snippet] = []
    rest: list[Snippet] = []
    for name in names:
        (tested if len(tested) < wanted["test"] else rest).extend(films[name])
    if len(tested) < wanted["test"] or len(rest) < wanted["train"] + wanted["val"]:
        return None
    mixed = [rest[i] for i in rng.permutation(len(rest))]
    return {"train": mixed[: wanted["train"]], "val": mixed[wanted["train"] :], "test": tested}


def fashion_mnist_clients(
    directory: Path, *, clients: int, train: int, val: int, test: int, alpha: float, seed: int
) -> list[ImageRows]:
    """Deals Fashion-MNIST out to clients with skewed labels.

    Each client draws its shares of the ten classes from a symmetric Dirichlet distribution: the smaller
    `alpha`, the fewer classes it sees. Train and val come from the data set's training images, test from its
    test images with the same shares. No image is dealt twice. When a class has run out, its part goes to the
    client's other classes.

    Args:
        directory: What ``fetch("fashion-mnist")`` returned.
        clients: How many clients.
        train: Rows for training, of each client.
        val: Rows for validation, of each client.
        test: Rows for testing, of each client.
        alpha: Concentration, above 0; 0.1 is strong skew, 100 is nearly none.
        seed: Of the shares, the choice and the order.

    Returns:
        Each client's rows: exactly `train`, then `val`, then `test` of them.

    Raises:
        DataError: The data set cannot be read, has too few rows, or `alpha` is not above 0.
    """
    _check_counts(clients, train, val, test)
    if not 0 < alpha < float("inf"):
        raise DataError(f"alpha is {alpha}", "choose an alpha above 0, such as 0.5")
    seen_images, seen_labels = read_fashion_mnist(directory, "train")
    unseen_images, unseen_labels = read_fashion_mnist(directory, "t10k")
    for want, have, what in ((train + val, len(seen_labels), "training"), (test, len(unseen_labels), "test")):
        if clients * want > have:
            raise DataError(
                f"{clients} clients of {want} rows are more than the {have} {what} images in {directory}",
                "ask for fewer clients or fewer rows",
            )
    rng = np.random.default_rng(seed)
    pools = _pools(seen_labels, rng), _pools(unseen_labels, rng)
    codes = np.repeat(np.arange(3, dtype=np.uint8), (train, val, test))
    dealt = []
    for _ in range(clients):
        shares = rng.dirichlet(np.full(_IMAGE_CLASSES, alpha))
        seen = _draw(pools[0], shares, train + val, rng)
        unseen = _draw(pools[1], shares, test, rng)
        images = np.concatenate([seen_images[seen], unseen_images[unseen]])
        labels = np.concatenate([seen_labels[seen], unseen_labels[unseen]]).astype(np.int64)
        dealt.append(ImageRows(images, labels, codes.copy()))
    return dealt


def read_fashion_mnist(directory: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of one part of the data set."""
    images = read_idx(directory / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(directory / f"{part}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or (labels >= _IMAGE_CLASSES).any():
        raise DataError(
            f"{directory} holds {part} images {images.shape} and {len(labels)} labels, which do not fit",
            "delete the files and fetch the data set again",
        )
    return images, labels


def _pools(labels: npt.NDArray[np.uint8], rng: np.random.Generator) -> list[list[int]]:
    """Row numbers of each class, in random order."""
    return [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in range(_IMAGE_CLASSES)]


def _draw(
    pools: list[list[int]], shares: npt.NDArray[np.float64], rows: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Takes `rows` row numbers out of the pools, by class shares, in random order."""
    drawn: list[int] = []
    while len(drawn) < rows:
        left = np.array([len(pool) for pool in pools], dtype=np.float64)
        weights = np.where(left > 0, shares, 0.0)
        if weights.sum() <= 0:  # all of the client's classes have run out
            weights = left
        counts = rng.multinomial(rows - len(drawn), weights / weights.sum())
        for pool, count in zip(pools, counts.tolist(), strict=True):
            taken = min(count, len(pool))
            drawn.extend(pool[len(pool) - taken :])
            del pool[len(pool) - taken :]
    return rng.permutation(np.array(drawn, dtype=np.int64))


def write_jsonl(rows: Iterable[Mapping[str, object]], path: Path) -> None:
    """Writes rows as JSON lines in UTF-8, all or nothing.

    Args:
        rows: Mappings that JSON can express.
        path: The file; its folder is made if it is missing.

    Raises:
        DataError: A row cannot be expressed in JSON.
        OSError: The file cannot be written; an old one is then still there.
    """
    try:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    except (TypeError, ValueError) as error:
        remedy = "use strings, finite numbers and booleans"
        raise DataError(f"a row for {path} is not JSON: {error}", remedy) from error
    write_atomic(path, "".join(lines).encode("utf-8"))


def write_images(
    path: Path,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    splits: npt.NDArray[np.uint8],
) -> None:
    """Writes a client's images as a safetensors file with `images`, `labels` and `split`, all or nothing.

    Args:
        path: The file; its folder is made if it is missing.
        images: uint8 [N, H, W].
        labels: int64 [N].
        splits: uint8 [N], places in `SPLITS`.

    Raises:
        DataError: A shape, a type or a split code is another.
        OSError: The file cannot be written; an old one is then still there.
    """
    from safetensors.numpy import save

    rows = len(images)
    fits = (
        (images.dtype, images.ndim) == (np.dtype(np.uint8), 3)
        and (labels.dtype, labels.shape) == (np.dtype(np.int64), (rows,))
        and (splits.dtype, splits.shape) == (np.dtype(np.uint8), (rows,))
    )
    if not fits or (splits >= len(SPLITS)).any():
        raise DataError(
            f"the rows for {path} have images {images.dtype} {images.shape}, labels {labels.dtype} "
            f"{labels.shape} and splits {splits.dtype} {splits.shape}",
            "give uint8 [N, H, W], int64 [N] and uint8 [N] with splits 0, 1 and 2",
        )
    tensors = {"images": images, "labels": labels, "split": splits}
    write_atomic(path, save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
