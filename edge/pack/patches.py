"""Pictures → the patches that a vision transformer embeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.pack.manifest import Image


def to_patches(pictures: NDArray[np.uint8], spec: Image) -> NDArray[np.float32]:
    """Resize, normalise and cut pictures.

    Args:
        pictures: Grey [n, h, w] or colour [n, h, w, 3].
        spec: How the backbone wants them.

    Returns:
        Float32 [n, 1 + (size / patch)², 3 · patch²]; the first row of each picture is zero, the class token's place.
    """
    return cut(normalise(pictures, spec), spec)


def normalise(pictures: NDArray[np.uint8], spec: Image) -> NDArray[np.float32]:
    """Resize grey [n, h, w] or colour [n, h, w, 3] and normalise each channel: float32 [n, size, size, 3]."""
    if pictures.ndim == 3:
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    scaled = _resize(pictures.astype(np.float32) / 255.0, spec.size)
    normal = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return normal.astype(np.float32, copy=False)


def thumbnails(pictures: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Resize grey [n, h, w] or colour [n, h, w, 3]: float32 [n, 3, side, side] from 0 to 255."""
    scaled = _resize((pictures[..., None] if pictures.ndim == 3 else pictures).astype(np.float32), side)
    out = np.empty((len(pictures), 3, side, side), dtype=np.float32)
    out[...] = scaled.transpose(0, 3, 1, 2)
    return out


def cut(normal: NDArray[np.float32], spec: Image) -> NDArray[np.float32]:
    """Normalised pictures [n, size, size, 3] → patches, as :func:`to_patches` returns them."""
    side, patch = spec.size // spec.patch, spec.patch
    grid = normal.reshape(len(normal), side, patch, side, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    out = np.zeros((len(normal), side * side + 1, 3 * patch * patch), dtype=np.float32)
    out[:, 1:] = grid.reshape(len(normal), side * side, -1)
    return out


def _resize(pictures: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Bilinear, pixel centres aligned as in torch's ``interpolate(align_corners=False)``."""
    for axis in (1, 2):
        old = pictures.shape[axis]
        if old == size:
            continue
        position = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, old - 1)
        share = (position - low).astype(np.float32)
        share = share.reshape([-1 if i == axis else 1 for i in range(pictures.ndim)])
        pictures = np.take(pictures, low, axis) * (1 - share) + np.take(pictures, high, axis) * share
    return pictures
