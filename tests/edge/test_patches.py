"""Pictures to patches, against torch's ``unfold`` and ``interpolate``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.pack.manifest import Image
from fleetune.edge.pack.patches import to_patches

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def reference(pictures: Any, spec: Image) -> Any:
    channels = torch.from_numpy(pictures).float() / 255
    channels = channels[:, None].expand(-1, 3, -1, -1) if channels.ndim == 3 else channels.permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(channels, (spec.size, spec.size), mode="bilinear", align_corners=False)
    normal = (scaled - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    columns = torch.nn.functional.unfold(normal, spec.patch, stride=spec.patch)
    return columns.transpose(1, 2).numpy()


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(28, 14), (16, 4), (8, 8), (6, 1)]),
    st.integers(0, 9),
)
def test_patches_equal_torch(
    count: int, colour: bool, height: int, width: int, sizes: tuple[int, int], seed: int
) -> None:
    shape = (count, height, width, 3) if colour else (count, height, width)
    pictures = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    spec = Image(size=sizes[0], patch=sizes[1], mean=MEAN, std=STD)
    found = to_patches(pictures, spec)
    grid = (spec.size // spec.patch) ** 2
    assert found.shape == (count, 1 + grid, 3 * spec.patch**2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 1:], reference(pictures, spec), atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 28, 28, 3)])
def test_a_picture_of_the_right_size_is_not_blurred(shape: tuple[int, ...]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = Image(size=28, patch=14, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(to_patches(pictures, spec)[:, 1:], reference(pictures, spec))


def test_the_class_tokens_place_is_zero() -> None:
    pictures = np.full((2, 20, 20, 3), 255, dtype=np.uint8)
    assert not to_patches(pictures, Image(size=28, patch=14, mean=MEAN, std=STD))[:, 0].any()


def test_grey_is_the_same_as_colour_with_equal_channels() -> None:
    spec = Image(size=28, patch=7, mean=MEAN, std=STD)
    grey = np.random.default_rng(0).integers(0, 256, (2, 31, 17), dtype=np.uint8)
    np.testing.assert_array_equal(to_patches(grey, spec), to_patches(np.stack([grey] * 3, axis=3), spec))
