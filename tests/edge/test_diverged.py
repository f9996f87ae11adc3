"""A round that meets NaN or infinity stops, names step and samples, and leaves what was learnt before as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.edge.agent.state import JobStore
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import ADAPTER
from fleetune.edge.methods import METHODS
from fleetune.edge.methods.base import Device, ExpertSettings, Outcome, Round
from fleetune.edge.methods.local import ExpertLearner, LocalRun, diverged, is_finite
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.modelfile import FILE
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

COSTS = Costs("p", "1", "1", "x", 1, "1 core", (Trial(1, 2, 8, False, 50.0, 50.0, 60.0, 0.01, 0.01, 1e-6, 1e-6),))
ROUND = Round("global", 1, {}, {}, Guard())
SETTINGS: dict[str, Any] = {
    "rank": 4, "targets": "query,value,fc1", "classes": 2, "seed": 0, "max_depth": 2, "depth": 2, "epochs": 2,
    "batch": 6, "optimiser": "adam", "learning_rate": 5e-3, "weight_decay": 0.0,
}  # fmt: skip
GATE = {"gate_rank": 4, "gate_learning_rate": 1e-3, "gate_epochs": 1, "gate_split": "train", "mix": "logits"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's own words on what is not finite


@pytest.fixture
def make(text_data: Path, tmp_path: Path) -> Callable[..., Device]:
    """Devices that share a private store."""

    def make(pack: Pack, *, recompute: bool = False, codec: Any = "none") -> Device:
        data, backbone = read_dataset(text_data, pack), Backbone(pack, threads=1)
        return Device(
            id="cam-01",
            backbone=backbone,
            dataset=data,
            cache=PrefixCache(tmp_path / "cache", backbone, data, micro_batch=4, codec=codec),
            plan=Plan(2, 4, recompute, codec, 1.0, 60.0, 1.0, 1.0, None),
            costs=COSTS,
            store=JobStore(tmp_path / "private", "r1", "job"),
            progress=lambda _share, _loss: None,
        )

    return make


def settings(**changes: Any) -> ExpertSettings:
    return ExpertSettings(**{**SETTINGS, **changes})


def train(device: Device, expert: Expert, **changes: Any) -> list[np.ndarray[Any, Any]]:
    """Train, and return the expert before each step."""
    before = [expert.vector.copy()]
    learner = ExpertLearner(
        expert, settings(**changes), on_batch=lambda _indices, _features: before.append(expert.vector.copy())
    )
    LocalRun(device, settings(**changes), expert).train(
        learner,
        ROUND,
        np.random.default_rng(0),
        evaluated=0,
    )
    return before


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_the_one_sample_whose_loss_is_not_finite_is_named(
    recompute: bool, make: Callable[..., Device], poisoned_pack: Pack, text_data: Path
) -> None:
    device = make(poisoned_pack, recompute=recompute)
    expert = Expert.initial(Layout.of(poisoned_pack.manifest, 2), seed=0)
    seen = [expert.vector.copy()]
    run = LocalRun(device, settings(), expert)
    with pytest.raises(DataError) as caught:
        learner = ExpertLearner(
            expert, settings(), on_batch=lambda _indices, _features: seen.append(expert.vector.copy())
        )
        run.train(learner, ROUND, np.random.default_rng(1), evaluated=0)
    order = np.random.default_rng(1).permutation(device.dataset.indices("train"))
    step = 1 + int(np.flatnonzero(order == 6)[0]) // 6
    assert f"{text_data}, line 7: the loss is not finite at step {step} of the round" in caught.value.what
    assert "the batch's other 5 samples" in caught.value.what
    assert len(seen) == step
    np.testing.assert_array_equal(expert.vector, seen[-1])
    assert np.isfinite(expert.vector).all()


def test_a_step_that_diverges_for_all_names_the_batch(
    make: Callable[..., Device], tiny_bert_pack: Pack, text_data: Path
) -> None:
    expert = Expert.initial(Layout.of(tiny_bert_pack.manifest, 2), seed=0)
    with pytest.raises(DataError) as caught:
        train(make(tiny_bert_pack), expert, learning_rate=3e38)
    assert "the loss is not finite at step 2 of the round, for the whole batch" in caught.value.what
    assert f"({text_data}, lines " in caught.value.what
    assert len(caught.value.what.partition("lines ")[2].split(",")) == 6
    assert "learning rate" in caught.value.remedy


def test_a_gradient_that_is_not_finite_stops_the_round_too() -> None:
    fine = np.ones(5, np.float32)
    assert is_finite(0.5, fine, fine)
    for bad in (np.nan, np.inf, 1e38):  # the last one is finite; no step of its size is
        assert not is_finite(0.5, fine, np.array([0, bad], np.float32))
        assert not is_finite(0.5, np.array([[bad], [0]], np.float32))
    assert not is_finite(np.nan, fine)
    assert not is_finite(-np.inf)


def test_the_samples_to_blame_are_those_that_fail_alone(
    make: Callable[..., Device], tiny_bert_pack: Pack, text_data: Path
) -> None:
    dataset = make(tiny_bert_pack).dataset
    batch = np.array([5, 3, 8])
    one = diverged(dataset, "the loss", 4, batch, lambda some: some[0] != 3)
    assert f"{text_data}, line 4: the loss is not finite at step 5" in one.what
    assert f"{text_data}, line 4: " in diverged(dataset, "the loss", 4, batch[:2], lambda some: some[0] != 3).what
    for is_sound in (lambda _: True, lambda _: False, lambda some: some[0] == 3):
        assert (
            f"for the whole batch ({text_data}, lines 4, 6, 9)"
            in diverged(dataset, "the loss", 4, batch, is_sound).what
        )


def test_features_that_are_not_finite_name_their_samples(
    make: Callable[..., Device], poisoned_pack: Pack, text_data: Path
) -> None:
    device = make(poisoned_pack)
    expert = Expert.initial(Layout.of(poisoned_pack.manifest, 2), seed=0)
    run = LocalRun(device, settings(), expert)
    with pytest.raises(DataError, match=f"{text_data}, lines 15, 23: the feature vector is not finite"):
        run.features(expert, np.concatenate([device.dataset.indices("val"), device.dataset.indices("test")]))


# --- what a method keeps ------------------------------------------------------------------------------------


def play(device: Device, method: str, stage: Any = "personal", **changes: Any) -> Outcome:
    gate = GATE if method == "fedms" else {}
    layout = Layout.of(device.backbone.pack.manifest, 2)
    announced = {**SETTINGS, **gate, **changes}
    shared, initial = Expert.initial(layout, seed=3), Expert.initial(layout, seed=SETTINGS["seed"])
    gained = shared.gained(initial, layout.blocks) if method == "fedms" and stage != "global" else {}
    return METHODS[method](device).run(Round(stage, 1, announced, gained, Guard()))


def stored(device: Device) -> dict[str, bytes]:
    store = device.store
    assert isinstance(store, JobStore)
    return {file.name: file.read_bytes() for file in store.folder.iterdir()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"learning_rate": 3e38, "gate_split": "val"}, "the loss is not finite at step 2 of the round"),
    ({"learning_rate": 3e38}, "the gate's loss is not finite at step 1 of the round, for the whole batch"),
    ({"learning_rate": 3e38, "gate_split": "val", "epochs": 1, "batch": 12}, "the feature vector is not finite"),
    ({"gate_learning_rate": 1e30}, "the gate's loss is not finite at step 2 of the round"),
    ({"gate_learning_rate": 1e30, "gate_split": "val", "batch": 2}, "the gate's loss is not finite at step 2"),
    ({"gate_learning_rate": 3e38, "epochs": 1, "batch": 12}, "the gate's weight is not finite"),
    ({"gate_learning_rate": 1e30, "mix": "features"}, "the gate's loss is not finite at step 2 of the round"),
])  # fmt: skip
def test_a_personal_round_that_diverges_leaves_the_private_expert_and_gate_as_they_were(
    changes: dict[str, Any], message: str, make: Callable[..., Device], tiny_bert_pack: Pack
) -> None:
    good = play(make(tiny_bert_pack, codec="f16"), "fedms")
    assert good.tensors.keys() == set(ADAPTER)
    device = make(tiny_bert_pack, codec="f16")
    before = stored(device)
    assert before.keys() == {FILE}
    with pytest.raises(DataError, match=message):
        play(device, "fedms", **changes)
    assert stored(device) == before
    assert play(device, "fedms").metrics["loss"] < good.metrics["loss"]  # goes on from there


@pytest.mark.parametrize("changes", [{"learning_rate": 3e38}, {"learning_rate": 3e38, "epochs": 1, "batch": 12}])
def test_a_stand_alone_round_that_diverges_leaves_its_expert_as_it_was(
    changes: dict[str, Any], make: Callable[..., Device], tiny_bert_pack: Pack
) -> None:
    play(make(tiny_bert_pack), "standalone", "train")
    device = make(tiny_bert_pack)
    before = stored(device)
    with pytest.raises(DataError, match="is not finite"):
        play(device, "standalone", "train", **changes)
    assert stored(device) == before


@pytest.mark.parametrize(("method", "stage"), [
    ("frozen-head", "train"), ("standalone", "train"), ("fedms", "global"), ("fedms", "personal"),
    ("fedms", "prepare"), ("fedms", "evaluate"),
])  # fmt: skip
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_every_method_names_the_sample_that_is_not_finite(
    method: str, stage: Any, codec: Any, make: Callable[..., Device], poisoned_pack: Pack, text_data: Path
) -> None:
    device = make(poisoned_pack, codec=codec)
    with pytest.raises(DataError, match=rf"{text_data}, lines? (7|15|23)\b.* is not finite"):
        play(device, method, stage)
