"""An emulated device computes what this machine computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from emulated import step
from emulated.device import Device
from fleetune.edge.pack.pack import Pack

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

TOLERANCE = {"cached": 1e-3, "initial": 0.0}
"""The cache rounds to float16; initial adapters are drawn, and every device has to draw the same ones."""


@pytest.fixture(scope="session")
def few_texts(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third of the texts: an emulator is slow."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(text_data.read_text(encoding="utf-8").splitlines(keepends=True)[::3]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 of three classes, of 28 pixels."""
    path = tmp_path_factory.mktemp("pictures") / "pictures.safetensors"
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    split = np.array([0] * 8 + [1, 1, 2, 2], dtype=np.uint8)
    safetensors.numpy.save_file({"images": images, "labels": np.arange(12) % 3, "split": split}, path)
    return path


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_dinov2", "minilm"])
def test_a_training_step_gives_the_same_numbers_as_here(
    device: Device, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pack: Pack = request.getfixturevalue(f"{kind}_pack")
    data: Path = request.getfixturevalue("few_pictures" if pack.manifest.image else "few_texts")
    done = device.run(step.__file__, pack.path, data, tmp_path / "found.safetensors")
    assert done.returncode == 0, done.stderr
    found = safetensors.numpy.load_file(tmp_path / "found.safetensors")
    wanted = step.train(pack, data)
    assert found.keys() == wanted.keys()
    errors = {name: np.abs(found[name] - tensor).max() / np.abs(tensor).max() for name, tensor in wanted.items()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE.get(name, 1e-4)} == {}
