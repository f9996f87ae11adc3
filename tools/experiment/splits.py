"""Deals samples out to clients, and each client's into what it learns from and what it is measured by.

Everything is a matter of row numbers: no sample is read. The same generator gives the same split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import ConfigError

TEST_SHARE = 0.2
"""Of a client's samples, what it is measured by."""

Rows = NDArray[np.int64]
"""Row numbers, ascending."""

_SHARES = (0.4, 0.6)
_ALPHAS = (0.001, 1000.0)
_DRAWS = 1000


def pathological(labels: NDArray[np.int64], clients: int, rng: np.random.Generator, *, each: int = 2) -> list[Rows]:
    """Gives each client samples of a few classes only, and each class to several clients (McMahan et al., 2017).

    A client takes, at random, of the classes that have been given away least. The clients that hold a class get shares
    of it in proportion to weights between 0.4 and 0.6.

    Args:
        labels: Class of each sample [n].
        clients: How many, 1 or more.
        rng: Source of classes, shares and samples.
        each: Classes of a client.

    Returns:
        Rows of each client; every row is one client's.

    Raises:
        ConfigError: There are fewer classes than a client shall have, or too few clients for two to hold each class.
    """
    classes = np.unique(labels)
    if not 2 <= each <= len(classes):
        raise ConfigError(
            f"clients of {each} classes cannot be made of data with {len(classes)}",
            f"choose from 2 to {len(classes)} classes a client",
        )
    if clients * each < 2 * len(classes):
        fewest = -(-2 * len(classes) // each)
        raise ConfigError(
            f"{clients} clients of {each} classes each cannot hold each of {len(classes)} classes twice",
            f"ask for {fewest} clients or more, or for more classes a client",
        )
    given = np.zeros(len(classes), dtype=np.int64)
    held = np.zeros((len(classes), clients), dtype=np.bool_)
    for client in range(clients):
        # Ties are decided at random; the least given first is what makes a client's classes different ones.
        chosen = np.lexsort((rng.random(len(classes)), given))[:each]
        given[chosen] += 1
        held[chosen, client] = True
    weights = np.where(held, rng.uniform(*_SHARES, size=held.shape), 0.0)
    return _dealt(labels, classes, _counts(labels, classes, weights), rng)


def dirichlet(
    labels: NDArray[np.int64], clients: int, rng: np.random.Generator, *, alpha: float, least: int
) -> list[Rows]:
    """Shares each class out among all clients by a draw from a symmetric Dirichlet distribution.

    The fewer alpha, the more clients differ (Hsu et al., 2019, who draw each client's classes; here it is each class's
    clients, as in Yurochkin et al., 2019, so that all samples are used).

    Args:
        labels: Class of each sample [n].
        clients: How many, 1 or more.
        rng: Source of shares and samples.
        alpha: Concentration.
        least: Samples that a client has at least; it is drawn again until each has, and two classes.

    Returns:
        Rows of each client; every row is one client's.

    Raises:
        ConfigError: A number is out of range, or no draw of 1,000 gives each client enough.
    """
    if not _ALPHAS[0] <= alpha <= _ALPHAS[1]:
        raise ConfigError(f"alpha is {alpha}", f"choose an alpha from {_ALPHAS[0]} to {_ALPHAS[1]:.0f}, such as 0.5")
    classes = np.unique(labels)
    for _ in range(_DRAWS):
        counts = _counts(labels, classes, rng.dirichlet(np.full(clients, alpha), size=len(classes)))
        if (counts.sum(axis=0) >= least).all() and ((counts > 0).sum(axis=0) >= 2).all():
            return _dealt(labels, classes, counts, rng)
    raise ConfigError(
        f"with alpha {alpha:g} none of {_DRAWS} draws gave each of {clients} clients {least} of {len(labels)} samples, "
        "of two classes",
        "ask for fewer clients, a larger alpha or a smaller batch",
    )


def natural(groups: NDArray[np.int64]) -> list[Rows]:
    """Gives each client one group.

    Args:
        groups: Group of each sample [n].

    Returns:
        Rows of each group, in ascending order of the groups.
    """
    return [np.flatnonzero(groups == group).astype(np.int64) for group in np.unique(groups)]


def held_out(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Chooses a fifth of one client's samples to measure it by.

    It is a fifth of each class, as nearly as whole samples allow; the only sample of a class is one to learn from.

    Args:
        labels: Class of each of its samples [n].
        rng: Source of the choice.

    Returns:
        Whether each is one to measure by [n].
    """
    classes, counts = np.unique(labels, return_counts=True)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    takes = np.minimum(_rounded(counts.astype(np.float64) * TEST_SHARE), counts - 1)
    for label, take in zip(classes, takes, strict=True):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return chosen


def held_out_subjects(
    subjects: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Chooses a fifth of all clients' samples to measure them by, all those of a subject or none.

    Where several clients have samples of one subject, what one learns from must not show what another is measured by.
    Subjects are taken class by class, in random order, as long as they fit into the class's fifth.

    Args:
        subjects: What each sample shows [n].
        labels: Class of each sample [n]; a subject counts for the class of its first sample.
        rng: Source of the choice.

    Returns:
        Whether each is one to measure by [n].
    """
    _, first, place, sizes = np.unique(subjects, return_index=True, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(first), dtype=np.bool_)
    for label in np.unique(labels[first]):
        own = rng.permutation(np.flatnonzero(labels[first] == label))
        left = round(sizes[own].sum() * TEST_SHARE)
        for subject in own:
            if sizes[subject] <= left:
                chosen[subject] = True
                left -= sizes[subject]
    return chosen[place]


def thinned(rows: Rows, labels: NDArray[np.int64], most: int, rng: np.random.Generator) -> Rows:
    """Chooses some of a client's samples, classes in proportion.

    Args:
        rows: The samples.
        labels: Class of each sample of the data set.
        most: How many to choose; all, if there are no more.
        rng: Source of the choice.
    """
    if len(rows) <= most:
        return rows
    own = labels[rows]
    classes, counts = np.unique(own, return_counts=True)
    takes = _rounded(counts.astype(np.float64) * (most / len(rows)))
    kept = [rng.permutation(rows[own == label])[:take] for label, take in zip(classes, takes, strict=True)]
    return np.sort(np.concatenate(kept))


def _counts(labels: NDArray[np.int64], classes: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Samples of each class [classes] for each client [clients], all of them, in proportion to weights."""
    of_class = np.array([(labels == label).sum() for label in classes])
    shares = weights / weights.sum(axis=1, keepdims=True) * of_class[:, None]
    return np.stack([_rounded(row) for row in shares])


def _dealt(
    labels: NDArray[np.int64], classes: NDArray[np.int64], counts: NDArray[np.int64], rng: np.random.Generator
) -> list[Rows]:
    """Rows of each client, so many of each class as counts [classes, clients] say."""
    pieces = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), np.cumsum(row)[:-1])
        for label, row in zip(classes, counts, strict=True)
    ]
    return [np.sort(np.concatenate(own)) for own in zip(*pieces, strict=True)]


def _rounded(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers whose running sums are those of the shares, rounded: so their sum is too."""
    return np.diff(np.rint(np.cumsum(shares)), prepend=0).astype(np.int64)
