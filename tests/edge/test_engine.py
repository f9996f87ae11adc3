"""The engine on small packs: features and gradients as torch computes them, kept or recomputed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.loss import cross_entropy, softmax
from fleetune.edge.engine.optimiser import Adam, Sgd
from fleetune.edge.engine.suffix import Part, Suffix
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import DataError, PackError

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")

KINDS = ["bert", "dinov2"]
LENGTHS = {"bert": 9, "dinov2": 5}


class Case:
    """A tiny pack, its torch twin, random adapters and a batch of hidden states, a part of it padding."""

    def __init__(self, kind: str, request: pytest.FixtureRequest) -> None:
        self.pack: Pack = request.getfixturevalue(f"tiny_{kind}_pack")
        self.reference: Any = request.getfixturevalue(f"{kind}_reference")
        self.layout = Layout.of(self.pack.manifest, classes=3)
        rng = np.random.default_rng(5)
        self.expert = Expert(self.layout, rng.normal(0, 0.1, self.layout.size).astype(np.float32))
        batch, length = 4, LENGTHS[kind]
        self.hidden = rng.standard_normal((batch, length, 64), dtype=np.float32)
        self.labels = np.array([2, 0, 1, 0])
        self.mask = np.ones((batch, 1, length), dtype=np.float32)
        if kind == "bert":
            self.mask[0, 0, 4:] = 0
            self.mask[2, 0, 1:] = 0

    def gradients(
        self, depth: int, *, recompute: bool, rows: slice = slice(None), into: Expert | None = None
    ) -> Expert:
        into = into or Expert(self.layout)
        suffix = Suffix(Backbone(self.pack, threads=1), depth, recompute=recompute)
        suffix.step(self.hidden[rows], self.mask[rows], self.labels[rows], self.expert, into)
        return into

    def features(self, depth: int, parts: list[Part], expert: Expert) -> list[Any]:
        return Suffix(Backbone(self.pack, threads=1), depth, recompute=False).features(parts, expert)

    def torch_features(self, depth: int, adapters: dict[str, Any]) -> Any:
        blocks = range(self.layout.blocks - depth, self.layout.blocks)
        return self.reference.features(torch.tensor(self.hidden), torch.tensor(self.mask), blocks, adapters)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, request)


def error(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# --- features and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fused_and_recomputed_gradients_equal_torch_through_the_whole_suffix(case: Case, depth: int) -> None:
    active = case.layout.names(depth)
    symbols = {name: torch.tensor(case.expert.tensors[name], requires_grad=True) for name in active}
    logits = case.torch_features(depth, symbols) @ symbols["head.weight"] + symbols["head.bias"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(case.labels), reduction="sum")
    wanted = torch.autograd.grad(loss, list(symbols.values()))
    for recompute in (False, True):
        found = case.gradients(depth, recompute=recompute)
        for name, grad in zip(active, wanted, strict=True):
            assert error(found.tensors[name], grad.numpy()) < 1e-5, (name, recompute)
        assert not found.vector[: case.layout.tail(depth).start].any()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_returns_the_summed_loss_and_the_features(case: Case, recompute: bool) -> None:
    suffix = Suffix(Backbone(case.pack, threads=1), 2, recompute=recompute)
    loss, features = suffix.step(case.hidden, case.mask, case.labels, case.expert, Expert(case.layout))
    wanted = case.torch_features(2, {name: torch.tensor(tensor) for name, tensor in case.expert.tensors.items()})
    logits = wanted @ torch.tensor(case.expert.tensors["head.weight"]) + torch.tensor(case.expert.tensors["head.bias"])
    assert error(features, wanted.numpy()) < 1e-5
    summed = torch.nn.functional.cross_entropy(logits, torch.tensor(case.labels), reduction="sum")
    assert loss == pytest.approx(float(summed), rel=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_features_equal_torch(case: Case, depth: int) -> None:
    adapters = {name: torch.tensor(tensor) for name, tensor in case.expert.tensors.items()}
    (found,) = case.features(depth, [(case.hidden, case.mask)], case.expert)
    assert error(found, case.torch_features(depth, adapters).numpy()) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(case: Case, recompute: bool) -> None:
    whole = case.gradients(2, recompute=recompute)
    pieces = Expert(case.layout)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        case.gradients(2, recompute=recompute, rows=rows, into=pieces)
    assert error(pieces.vector, whole.vector) < 1e-5


def test_several_micro_batches_have_the_features_of_one(case: Case) -> None:
    (whole,) = case.features(2, [(case.hidden, case.mask)], case.expert)
    parts = [(case.hidden[rows], case.mask[rows]) for rows in (slice(0, 3), slice(3, 4))]
    np.testing.assert_allclose(np.concatenate(case.features(2, parts, case.expert)), whole, atol=1e-5)


def test_padding_changes_neither_features_nor_gradients(request: pytest.FixtureRequest) -> None:
    case = Case("bert", request)
    short = case.hidden[:1, :4], case.mask[:1, :, :4]
    rubbish = np.concatenate([short[0], np.full((1, 7, 64), 30, dtype=np.float32)], axis=1)
    padded = rubbish, np.pad(short[1], ((0, 0), (0, 0), (0, 7)))
    without, with_padding = (case.features(3, [part], case.expert)[0] for part in (short, padded))
    np.testing.assert_allclose(with_padding, without, atol=1e-5)
    found = [Expert(case.layout), Expert(case.layout)]
    for into, part in zip(found, (short, padded), strict=True):
        Suffix(Backbone(case.pack, threads=1), 3, recompute=False).step(*part, case.labels[:1], case.expert, into)
    assert error(found[1].vector, found[0].vector) < 1e-5


def test_an_initial_expert_leaves_the_frozen_backbones_features_unchanged(case: Case) -> None:
    part = [(case.hidden, case.mask)]
    (found,) = case.features(3, part, Expert.initial(case.layout, seed=3))
    (frozen,) = case.features(3, part, Expert(case.layout))
    np.testing.assert_array_equal(found, frozen)
    assert error(found, case.torch_features(3, {}).numpy()) < 1e-5
    assert error(case.features(3, part, case.expert)[0], frozen) > 1e-3


def test_a_graph_that_does_not_load_is_named(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(tiny_bert_pack.path, folder)
    file = folder / "embed.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)
    backbone = Backbone(Pack.open(folder, verify=False), threads=1)
    with pytest.raises(PackError, match=f"{file} does not load in onnxruntime"):
        backbone.embed(np.zeros((1, 2, 64), dtype=np.float32))


# --- the expert's layout ------------------------------------------------------------------------------------

layouts = st.builds(
    Layout,
    blocks=st.integers(1, 5),
    width=st.integers(1, 6),
    rank=st.integers(1, 3),
    targets=st.dictionaries(
        st.sampled_from(["query", "value", "fc1", "fc2"]),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        min_size=1,
    ),
    classes=st.integers(2, 4),
)


@given(layouts, st.data())
def test_the_tail_of_a_depth_is_exactly_what_the_depth_names(layout: Layout, data: st.DataObject) -> None:
    depth = data.draw(st.integers(0, layout.blocks))
    expert = Expert(layout)
    expert.vector[layout.tail(depth)] = 1
    active = set(layout.names(depth))
    for name, tensor in expert.tensors.items():
        assert tensor.all() if name in active else not tensor.any(), name
    assert set(expert.active(depth)) == active
    assert sum(tensor.size for tensor in expert.tensors.values()) == layout.size


@settings(max_examples=20)
@given(layouts)
def test_a_copy_is_independent_and_views_share_memory(layout: Layout) -> None:
    expert = Expert.initial(layout, seed=1)
    copy = expert.copy()
    copy.tensors["head.bias"] += 1
    assert not expert.tensors["head.bias"].any()
    assert copy.vector[-1] == 1


def test_what_was_gained_is_what_leads_from_the_start_to_where_training_came(tiny_bert_pack: Pack) -> None:
    layout = Layout.of(tiny_bert_pack.manifest, classes=3)
    start, trained = (Expert.initial(layout, seed=seed) for seed in (1, 2))
    gained = trained.gained(start, depth=2)
    assert list(gained) == layout.names(2)
    found = start.copy()
    found.add({**gained, "gate.A": np.zeros(1, np.float32)})  # of which an expert has no part
    for name, tensor in found.tensors.items():
        wanted = trained if name in gained else start
        np.testing.assert_allclose(tensor, wanted.tensors[name], atol=1e-6)
    assert not np.array_equal(start.vector, found.vector)
    assert not start.gained(start, depth=2)["head.weight"].any()


def test_the_same_seed_gives_the_same_expert_with_every_b_zero(tiny_bert_pack: Pack) -> None:
    layout = Layout.of(tiny_bert_pack.manifest, classes=2)
    first, again, other = (Expert.initial(layout, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.vector, again.vector)
    assert (first.vector != other.vector).any()
    for name, tensor in first.tensors.items():
        if name.endswith(".A"):
            assert 0.5 < np.abs(tensor).max() * np.sqrt(tensor.shape[0]) <= 1
        elif name.endswith(".B"):
            assert not tensor.any()


@pytest.mark.parametrize(("name", "shape"), [("blocks.3.query.A", (64, 4)), ("head.weight", (64, 3)), ("gate.A", (1,))])
def test_a_tensor_that_does_not_fit_the_expert_is_named(
    name: str, shape: tuple[int, ...], tiny_bert_pack: Pack
) -> None:
    expert = Expert(Layout.of(tiny_bert_pack.manifest, classes=2))
    with pytest.raises(DataError, match=name):
        expert.load({name: np.zeros(shape, np.float32)})


def test_loading_overwrites_only_what_is_named(tiny_bert_pack: Pack) -> None:
    expert = Expert.initial(Layout.of(tiny_bert_pack.manifest, classes=2), seed=0)
    before = expert.copy()
    expert.load({"blocks.2.fc1.B": np.ones((4, 128), np.float32)})
    assert (expert.tensors["blocks.2.fc1.B"] == 1).all()
    expert.tensors["blocks.2.fc1.B"][...] = 0
    np.testing.assert_array_equal(expert.vector, before.vector)


# --- loss and optimiser -------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.1, 300), st.integers(0, 99))
def test_cross_entropy_equals_torch(n: int, classes: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (scale * rng.standard_normal((n, classes))).astype(np.float32)
    labels = rng.integers(0, classes, n)
    loss, slope = cross_entropy(logits, labels)
    x = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels), reduction="sum")
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(slope, x.grad.numpy(), atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    loss, slope = cross_entropy(np.array([[1e4, -1e4], [0, 3e38]], np.float32), np.array([1, 1]))
    assert np.isfinite(loss)
    np.testing.assert_allclose(slope, [[1, -1], [0, 0]])
    np.testing.assert_allclose(softmax(np.array([[-3e38, -3e38]], np.float32)), [[0.5, 0.5]])


def test_cross_entropy_does_not_change_its_arguments() -> None:
    logits = np.array([[1.0, 2.0]], np.float32)
    cross_entropy(logits, np.array([0]))
    assert logits.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "momentum"), [(Adam, 0.9), (Sgd, 0.9), (Sgd, 0.0)])
def test_optimisers_equal_torchs(kind: type[Adam] | type[Sgd], momentum: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    parameters = rng.standard_normal(50).astype(np.float32)
    symbol = torch.nn.Parameter(torch.tensor(parameters))
    adam, sgd = (
        torch.optim.AdamW([symbol], 0.03, weight_decay=decay),
        torch.optim.SGD([symbol], 0.03, momentum=momentum),
    )
    more = {} if kind is Adam else {"momentum": momentum}
    ours = kind(50, 0.03, weight_decay=decay, **more)
    for step in range(12):
        gradient = (rng.standard_normal(50) * 10.0 ** (step % 3 - 2)).astype(np.float32)
        ours.step(parameters, gradient)
        symbol.grad = torch.tensor(gradient)
        if kind is Adam:
            adam.step()
        else:
            with torch.no_grad():
                symbol.mul_(1 - 0.03 * decay)  # torch's own decay is not decoupled
            sgd.step()
        np.testing.assert_allclose(parameters, symbol.detach().numpy(), rtol=1e-5, atol=1e-6)
