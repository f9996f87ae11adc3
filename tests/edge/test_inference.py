"""Inference: one and two experts give the features that torch gives each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.suffix import forward_chunk
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class Case:
    """A tiny pack, its torch twin, and three samples, one of them shorter."""

    def __init__(self, kind: str, request: pytest.FixtureRequest) -> None:
        self.pack: Pack = request.getfixturevalue(f"tiny_{kind}_pack")
        self.reference: Any = request.getfixturevalue(f"{kind}_reference")
        self.layout = Layout.of(self.pack.manifest, classes=3)
        self.backbone = Backbone(self.pack, threads=1)
        self.rng = np.random.default_rng(3)
        if kind == "bert":
            self.sample = self.backbone.token_rows(self.rng.integers(0, 90, (3, 9)))
            self.mask = np.ones((3, 1, 9), dtype=np.float32)
            self.mask[1, 0, 4:] = 0
        else:
            spec = self.pack.manifest.image
            assert spec is not None
            self.sample = to_patches(self.rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8), spec)
            self.mask = np.ones((3, 1, 5), dtype=np.float32)

    def expert(self) -> Expert:
        """An expert with adapters in every block."""
        return Expert(self.layout, self.rng.normal(0, 0.1, self.layout.size).astype(np.float32))

    def changed(self, expert: Expert, depth: int) -> Expert:
        """The same expert with other values in its top blocks and its head."""
        other = expert.copy()
        for name in self.layout.names(depth):
            other.tensors[name] += self.rng.normal(0, 0.1, other.tensors[name].shape).astype(np.float32)
        return other

    def torch_features(self, expert: Expert) -> FloatArray:
        hidden = torch.tensor(self.backbone.embed(self.sample))
        adapters = {name: torch.tensor(tensor) for name, tensor in expert.tensors.items()}
        blocks = range(self.layout.blocks)
        found: FloatArray = self.reference.features(hidden, torch.tensor(self.mask), blocks, adapters).numpy()
        return found


@pytest.fixture(params=["bert", "dinov2"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, request)


def error(found: FloatArray, wanted: FloatArray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_a_single_expert_has_the_features_of_torch(case: Case) -> None:
    expert = case.expert()
    answer = Inference(case.pack, [expert], threads=1).run(case.sample, case.mask)
    assert answer.features.shape == (1, 3, 64)
    assert error(answer.features[0], case.torch_features(expert)) < 1e-5


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_each_of_two_experts_has_the_features_that_it_has_alone(case: Case, depth: int) -> None:
    first = case.expert()
    second = case.changed(first, depth)
    inference = Inference(case.pack, [first, second], threads=1)
    assert inference.depth == depth
    answer = inference.run(case.sample, case.mask)
    for features, expert in zip(answer.features, (first, second), strict=True):
        assert error(features, case.torch_features(expert)) < 1e-5


def test_experts_that_differ_in_their_heads_alone_have_the_same_features(case: Case) -> None:
    first = case.expert()
    second = case.changed(first, 0)
    answer = Inference(case.pack, [first, second], threads=1).run(case.sample, case.mask)
    np.testing.assert_allclose(answer.features[0], answer.features[1], atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_gate_sees_the_mean_over_real_tokens_under_the_first_expert(depth: int, case: Case) -> None:
    first = case.expert()
    answer = Inference(case.pack, [first, case.changed(first, depth)], threads=1).run(case.sample, case.mask)
    assert sorted(answer.pooled) == [0, 1, 2]
    for block, pooled in answer.pooled.items():
        start = [(case.backbone.embed(case.sample), case.mask)]
        ((hidden, mask),) = forward_chunk(case.backbone, range(block), first, start)
        assert error(pooled, (mask @ hidden)[:, 0] / mask.sum(axis=2)) < 1e-5


def test_a_batch_gives_what_its_samples_give_alone(case: Case) -> None:
    first = case.expert()
    inference = Inference(case.pack, [first, case.changed(first, 2)], threads=1)
    whole = inference.run(case.sample, case.mask).features
    for row in range(3):
        length = int(case.mask[row].sum())
        alone = inference.run(case.sample[row : row + 1, :length], case.mask[row : row + 1, :, :length]).features
        assert error(alone[:, 0], whole[:, row]) < 1e-5


def test_adapters_merge_into_weights_that_are_mapped_unquantised(tiny_bert: Path, tmp_path: Path) -> None:
    from fleetune.tools.pack.write import write_pack

    pack = write_pack(tiny_bert, tmp_path / "pack", name="t", licence="none", origin="t", max_length=24, weights="fp32")
    rng = np.random.default_rng(0)
    layout = Layout.of(pack.manifest, classes=2)
    expert = Expert(layout, rng.normal(0, 0.1, layout.size).astype(np.float32))
    backbone = Backbone(pack, threads=1)
    sample, mask = backbone.token_rows(rng.integers(0, 90, (2, 7))), np.ones((2, 1, 7), dtype=np.float32)
    ((hidden, _),) = forward_chunk(backbone, range(3), expert, [(backbone.embed(sample), mask)])
    found = Inference(pack, [expert], threads=1).run(sample, mask).features[0]
    assert error(found, backbone.pool(hidden, mask)) < 1e-5
