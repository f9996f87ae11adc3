"""Training of one factor of the adapters: A stays as the seed made it, and nothing of it goes up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.agent.state import JobStore
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Factors, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.model import Model
from fleetune.edge.methods.base import Device, ExpertSettings, Round
from fleetune.edge.methods.fedms.method import FedMS
from fleetune.edge.methods.local import ExpertLearner, LocalRun
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.modelfile import FILE
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

GRID = [(depth, micro, length) for depth in (1, 3) for micro in (1, 8) for length in (4, 8, 16)]


def trial(depth: int, micro_batch: int, length: int, recompute: bool) -> Trial:
    peak = 60.0 + depth * (10 + micro_batch * length / 8)
    return Trial(depth, micro_batch, length, recompute, 60.0, 60.0, peak, 0.01, 0.01, 1e-6, 1e-6)


COSTS = Costs(
    "p", "1", "1", "x", 1, "1 core", tuple(trial(*cell, recompute) for cell in GRID for recompute in (False, True))
)
SETTINGS: dict[str, Any] = {
    "rank": 4, "targets": "query,value,fc1", "classes": 2, "seed": 0, "max_depth": 2, "depth": 2, "epochs": 2,
    "batch": 4, "optimiser": "adam", "learning_rate": 5e-3, "weight_decay": 0.5,
}  # fmt: skip
GATE = {"gate_rank": 3, "gate_learning_rate": 1e-2, "gate_epochs": 1, "gate_split": "train", "mix": "logits"}


@pytest.fixture
def make(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> Callable[..., Device]:
    """Devices that share a private store."""

    def make(*, recompute: bool = False) -> Device:
        dataset, backbone = read_dataset(text_data, tiny_bert_pack), Backbone(tiny_bert_pack, threads=1)
        return Device(
            id="cam-01",
            backbone=backbone,
            dataset=dataset,
            cache=PrefixCache(tmp_path / "cache", backbone, dataset, micro_batch=4),
            plan=Plan(2, 4, recompute, "f16", 1.0, 60.0, 1.0, 1.0, None),
            costs=COSTS,
            store=JobStore(tmp_path / "private", "r1", "fedms"),
            progress=lambda _share, _loss: None,
        )

    return make


def train(device: Device, factors: Factors, *, guard: Guard | None = None, **changes: Any) -> tuple[Expert, Expert]:
    """An expert before and after a round of training."""
    expert = Expert.initial(Layout.of(device.backbone.pack.manifest, 2), seed=0)
    before, round_ = expert.copy(), Round("global", 1, {}, {}, guard or Guard())
    run = LocalRun(device, ExpertSettings(**{**SETTINGS, **changes}), expert)
    run.train(ExpertLearner(expert, run.settings, factors=factors), round_, np.random.default_rng(0), evaluated=0)
    return before, expert


def changed(before: Expert, after: Expert) -> set[str]:
    return {name for name, tensor in after.tensors.items() if (tensor != before.tensors[name]).any()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_a_stays_bit_for_bit_even_under_weight_decay(
    recompute: bool, optimiser: str, make: Callable[..., Device]
) -> None:
    before, after = train(make(recompute=recompute), "B", optimiser=optimiser)
    assert changed(before, after) == set(after.layout.names(2, "B"))
    assert not any(name.endswith(".A") for name in changed(before, after))


def test_a_stays_when_memory_becomes_short(make: Callable[..., Device]) -> None:
    pending = [0.0, 15.0]  # before the second step the lowest active block is frozen
    guard = Guard(excess_mib=lambda: pending.pop(0) if pending else 0.0)
    before, after = train(make(), "B", guard=guard)
    assert guard.eased == 1
    assert changed(before, after) == set(after.layout.names(2, "B"))


def test_b_learns_what_it_learns_beside_a(make: Callable[..., Device]) -> None:
    """In the first step A has no part: while B is zero, A changes nothing."""
    one_step = {"epochs": 1, "batch": 64, "weight_decay": 0.0}
    alone, together = (train(make(), factors, **one_step)[1] for factors in ("B", "AB"))
    for name in alone.layout.names(2, "B"):
        np.testing.assert_allclose(alone.tensors[name], together.tensors[name], atol=1e-7)
        assert alone.tensors[name].any()


layouts = st.builds(
    Layout,
    blocks=st.integers(1, 4),
    width=st.integers(1, 6),
    rank=st.integers(1, 3),
    targets=st.dictionaries(
        st.sampled_from(["query", "value", "fc1"]), st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1
    ),
    classes=st.integers(2, 4),
)


@given(layouts, st.data())
def test_what_is_trained_is_exactly_what_is_named(layout: Layout, data: st.DataObject) -> None:
    depth = data.draw(st.integers(0, layout.blocks))
    for factors in ("AB", "B"):
        expert = Expert(layout)
        expert.vector[layout.trained(depth, factors)] = 1  # type: ignore[arg-type]
        names = layout.names(depth, factors)  # type: ignore[arg-type]
        for name, tensor in expert.tensors.items():
            assert tensor.all() if name in names else not tensor.any(), name
    assert {name for name in layout.names(depth) if not name.endswith(".A")} == set(layout.names(depth, "B"))


# --- FedMS --------------------------------------------------------------------------------------------------


def play(device: Device, stage: Any) -> dict[str, Any]:
    announced = {**SETTINGS, **GATE, "factors": "B"}
    return FedMS(device).run(Round(stage, 1, announced, {}, Guard())).tensors


def test_of_an_expert_only_b_and_the_head_go_up(make: Callable[..., Device]) -> None:
    device = make()
    layout = Layout.of(device.backbone.pack.manifest, 2)
    assert list(play(device, "global")) == layout.names(2, "B")


def test_of_the_gate_only_b_goes_up_and_what_is_private_trains_both(make: Callable[..., Device]) -> None:
    device = make()
    assert list(play(device, "personal")) == ["gate.B"]
    model = Model.read(device.store.folder / FILE, device.backbone.pack)
    assert model.gate is not None
    assert model.local is not None
    fresh = Gate(device.backbone.pack.manifest.width, GATE["gate_rank"], SETTINGS["seed"])  # type: ignore[arg-type]
    np.testing.assert_array_equal(model.gate.tensors["gate.A"], fresh.tensors["gate.A"])
    assert model.gate.tensors["gate.weight"].any()
    assert changed(model.global_, model.local) == set(model.local.layout.names(2))
