"""The shared extractor: what it sees of a device's samples, and its representation of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import Dataset, ImageDataset
from fleetune.edge.engine.parameters import Parameters
from fleetune.edge.engine.prefix import split, token_mask
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.pack.patches import thumbnails

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

SIDE = 32
"""Height and width of the pictures that a shared CNN takes, in pixels."""


class Samples(Protocol):
    """What an extractor sees."""

    def __call__(self, indices: Indices) -> Mapping[str, FloatArray]:
        """``sample``, and of texts also ``mask`` [n, 1, t]."""
        ...


class Pictures:
    """Pictures of 32 by 32 pixels from −1 to 1, resized whenever they are seen.

    Args:
        images: Grey [n, h, w] or colour [n, h, w, 3], of any size.
    """

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images

    def __call__(self, indices: Indices) -> Mapping[str, FloatArray]:
        """``sample`` [n, 3, 32, 32]."""
        return {"sample": resized(self._images[indices])}


def resized(images: NDArray[np.uint8]) -> FloatArray:
    """Pictures, grey [n, h, w] or colour [n, h, w, 3], as a shared CNN sees them: [n, 3, 32, 32] from −1 to 1."""
    return centred(thumbnails(images, SIDE))


def centred(images: NDArray[np.uint8] | FloatArray) -> FloatArray:
    """Values from 0 to 255 as values from −1 to 1, of the same shape."""
    found = images.astype(np.float32)
    found /= 127.5
    found -= 1
    return found


class TokenRows:
    """Rows of the frozen token table.

    Args:
        dataset: The texts.
        backbone: Has the table.
    """

    def __init__(self, dataset: Dataset, backbone: Backbone) -> None:
        self._dataset, self._backbone = dataset, backbone

    def __call__(self, indices: Indices) -> Mapping[str, FloatArray]:
        """``sample`` [n, t, e] and ``mask``, cut to the longest of the texts."""
        rows = self._dataset.rows(self._backbone, indices)
        return {"sample": rows, "mask": token_mask(self._dataset.lengths[indices], rows.shape[1])}


def samples_of(dataset: Dataset, backbone: Backbone) -> Samples:
    """What an extractor sees of a device's samples."""
    if isinstance(dataset, ImageDataset):
        return Pictures(dataset.images)
    return TokenRows(dataset, backbone)


class Extractor:
    """The shared network on a device.

    Args:
        sessions: The pack's graphs.
        learned: Its tensors: θ.
        samples: What it sees.
        chunk: Samples that are evaluated at once.

    Attributes:
        gradient: Sum of the gradients of θ over micro-batches.
    """

    def __init__(self, sessions: Sessions, learned: Parameters, samples: Samples, *, chunk: int) -> None:
        self._sessions, self.learned, self.samples, self._chunk = sessions, learned, samples, chunk
        self.gradient = learned.blank()

    def representation(self, indices: Indices) -> FloatArray:
        """The shared representation [n, m] of some samples."""
        parts = (self.samples(some) for some in split(indices, self._chunk))
        return np.concatenate(
            [self._sessions.run("extractor", {**part, **self.learned.tensors})["representation"] for part in parts]
        )
