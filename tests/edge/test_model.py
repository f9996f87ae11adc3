"""A model file: what was written is read back, and whatever does not fit is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fleetune.edge.agent.state import State
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.model import Model, card_for
from fleetune.edge.methods.base import Device, Outcome, Round, Tensors
from fleetune.edge.methods.fedms.method import FedMS
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ModelError
from fleetune.edge.protocol.modelfile import FILE
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

Arrays = dict[str, np.ndarray[Any, Any]]

COSTS = Costs("p", "1", "1", "x", 1, "1 core", (Trial(1, 2, 8, False, 50.0, 50.0, 60.0, 0.01, 0.01, 1e-6, 1e-6),))


def random_model(pack: Pack, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    layout = Layout.of(pack.manifest, 3)
    experts = [Expert(layout, rng.standard_normal(layout.size, dtype=np.float32)) for _ in range(2)]
    gate = Gate(layout.width, 5, seed=0)
    for tensor in gate.tensors.values():
        tensor[...] = rng.standard_normal(tensor.shape)
    card = card_for(pack, kind="mixture", job="fedms", run="r1", classes=3, max_depth=2, mix="features")
    return Model(card, *experts, gate)


@pytest.fixture
def file(tiny_bert_pack: Pack, tmp_path: Path) -> Path:
    """A model file of a device."""
    path = tmp_path / FILE
    random_model(tiny_bert_pack).write(path)
    return path


def edit(file: Path, tensors: Callable[[Arrays], object] = lambda _: None, **card: Any) -> None:
    """Change a file's tensors, and fields of its card."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        found = json.loads(opened.metadata()["fleetune"])
    arrays = safetensors.numpy.load_file(file)
    tensors(arrays)
    file.write_bytes(safetensors.numpy.save(arrays, metadata={"fleetune": json.dumps(found | card)}))


def test_what_was_written_is_read_back(tiny_bert_pack: Pack, file: Path) -> None:
    written, found = random_model(tiny_bert_pack), Model.read(file, tiny_bert_pack)
    assert found.card == written.card
    assert found.card.boundary == 1
    assert found.local is not None
    assert found.gate is not None
    assert written.local is not None
    assert written.gate is not None
    np.testing.assert_array_equal(found.global_.vector, written.global_.vector)
    np.testing.assert_array_equal(found.local.vector, written.local.vector)
    for name, tensor in written.gate.tensors.items():
        np.testing.assert_array_equal(found.gate.tensors[name], tensor)
    assert found.mixture is not None
    assert (found.mixture.boundary, found.mixture.mix) == (1, "features")


def test_a_file_of_the_global_expert_alone_has_no_mixture(tiny_bert_pack: Pack, tmp_path: Path) -> None:
    model = random_model(tiny_bert_pack)
    Model(msgspec.structs.replace(model.card, kind="global"), model.global_).write(tmp_path / FILE)
    found = Model.read(tmp_path / FILE, tiny_bert_pack)
    np.testing.assert_array_equal(found.global_.vector, model.global_.vector)
    assert found.mixture is None


def test_a_block_that_nobody_trained_may_be_absent_and_changes_nothing(tiny_bert_pack: Pack, file: Path) -> None:
    def drop(tensors: Arrays) -> None:
        for name in list(tensors):
            if name.startswith("global.blocks.0."):
                del tensors[name]

    edit(file, drop)
    found = Model.read(file, tiny_bert_pack).global_
    assert not any(tensor.any() for tensor in found.adapters(0).values())
    assert all(tensor.any() for tensor in found.adapters(1).values())


def test_any_tool_can_read_the_card(tiny_bert_pack: Pack, file: Path) -> None:
    with safetensors.safe_open(file, framework="numpy") as opened:
        card = json.loads(opened.metadata()["fleetune"])
    assert card["schema"] == 1
    assert card["pack"] == tiny_bert_pack.sha256
    assert card["targets"] == list(tiny_bert_pack.manifest.targets)
    assert (card["job"], card["run"], card["mix"], card["classes"]) == ("fedms", "r1", "features", 3)


def assert_refused(file: Path, pack: Pack, *named: str) -> str:
    with pytest.raises(ModelError) as caught:
        Model.read(file, pack)
    for text in (str(file), *named):
        assert text in caught.value.what
    assert caught.value.remedy
    return caught.value.remedy


@pytest.mark.parametrize(("changes", "named"), [
    ({"backbone": "ab" * 32}, "the backbone abab"),
    ({"weights": "cd" * 32}, "weights cdcd"),
    ({"rank": 7}, "adapters of rank 7"),
    ({"targets": ["query"]}, "adapters on query,"),
    ({"blocks": 12}, "12"),
])  # fmt: skip
def test_another_pack_is_named(changes: dict[str, Any], named: str, file: Path, tiny_bert_pack: Pack) -> None:
    edit(file, **changes, pack="ef" * 32)
    assert "ef" * 32 in assert_refused(file, tiny_bert_pack, named, str(tiny_bert_pack.path))


def test_a_pack_of_other_files_with_the_same_weights_will_do(file: Path, tiny_bert_pack: Pack) -> None:
    edit(file, pack="ef" * 32)
    assert Model.read(file, tiny_bert_pack).card.pack == "ef" * 32


def test_a_newer_schema_names_the_version_to_install(file: Path, tiny_bert_pack: Pack) -> None:
    edit(file, schema=2, kit="9.1", what_nobody_knows_yet=[1])
    assert "use Fleetune 9.1" in assert_refused(file, tiny_bert_pack, "schema 2", "Fleetune 9.1")


@pytest.mark.parametrize(
    ("name", "value"), [("boundary", "1"), ("boundary", 3), ("mix", "sum"), ("classes", 1), ("pack", "x")]
)
def test_a_field_of_the_card_that_does_not_fit_is_named(
    name: str, value: Any, file: Path, tiny_bert_pack: Pack
) -> None:
    edit(file, **{name: value})
    assert_refused(file, tiny_bert_pack, f"field {name}")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 1500, -1])
def test_a_truncated_file_is_damaged(keep: int, file: Path, tiny_bert_pack: Pack) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(file, tiny_bert_pack, "is damaged")


@pytest.mark.parametrize(
    "raw", [b"\xff" * 400, (1 << 62).to_bytes(8, "little") + b"{}" * 99, b"\x08" + b"\0" * 7 + b"[" * 8]
)
def test_garbage_is_damaged(raw: bytes, file: Path, tiny_bert_pack: Pack) -> None:
    file.write_bytes(raw)
    assert_refused(file, tiny_bert_pack, "is damaged")


def test_other_safetensors_are_no_model(file: Path, tiny_bert_pack: Pack) -> None:
    file.write_bytes(safetensors.numpy.save({"head.bias": np.zeros(2, np.float32)}))
    assert "model.safetensors" in assert_refused(file, tiny_bert_pack, "not a model of Fleetune")


def test_a_card_that_is_too_long_is_not_parsed(file: Path, tiny_bert_pack: Pack) -> None:
    edit(file, job="x" * 70_000)
    assert_refused(file, tiny_bert_pack, "not a model of Fleetune")


def test_a_missing_file_says_where_models_are(tmp_path: Path, tiny_bert_pack: Pack) -> None:
    assert "STATE/" in assert_refused(tmp_path / "nothing", tiny_bert_pack)


def replace(name: str, value: Any) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(("change", "named"), [
    (drop("local.head.weight"), "local.head.weight"),
    (drop("global.blocks.1.fc1.B"), "global.blocks.1.fc1.B"),
    (drop("gate.bias"), "gate.bias"),
    (replace("local.blocks.9.query.A", np.zeros((64, 4), np.float32)), "blocks.9.query"),
    (replace("extra", np.zeros(1, np.float32)), "extra"),
    (replace("global.blocks.0.query.A", np.zeros((64, 5), np.float32)), "blocks.0.query.A"),
    (replace("global.head.bias", np.zeros(2, np.float32)), "head.bias"),
    (replace("gate.A", np.zeros((0, 1 << 40), np.float32)), "gate.A"),
    (replace("gate.A", np.zeros(64, np.float32)), "gate.A"),
    (replace("gate.B", np.zeros((2, 64), np.float32)), "gate.B"),
    (replace("gate.bias", np.zeros(2, np.float16)), "gate.bias"),
    (replace("gate.bias", np.full(2, np.nan, np.float32)), "gate.bias"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[Arrays], object], named: str, file: Path, tiny_bert_pack: Pack
) -> None:
    edit(file, change)
    assert_refused(file, tiny_bert_pack, "is damaged", named)


def test_more_classes_than_the_head_has_are_refused_before_room_is_made_for_them(
    file: Path, tiny_bert_pack: Pack
) -> None:
    edit(file, classes=1 << 60)
    assert_refused(file, tiny_bert_pack, "classes")


def test_a_write_that_fails_leaves_the_old_file(
    file: Path, tiny_bert_pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", failing)
        random_model(tiny_bert_pack, seed=1).write(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [FILE]


# --- FedMS on a device ----------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "rank": 4, "targets": "query,value,fc1", "classes": 2, "seed": 0, "max_depth": 2, "depth": 2, "epochs": 1,
    "batch": 4, "optimiser": "adam", "learning_rate": 5e-3, "weight_decay": 0.0, "gate_rank": 3,
    "gate_learning_rate": 1e-2, "gate_epochs": 1, "gate_split": "train", "mix": "logits",
}  # fmt: skip


class Trainer:
    """One device in stage 2 of FedMS, without a network."""

    def __init__(self, folder: Path, pack: Pack, data: Path) -> None:
        self.state = State(folder / "state", "cam-01")
        dataset, backbone = read_dataset(data, pack), Backbone(pack, threads=1)
        self.file = self.state.store("r1", "fedms").folder / FILE
        layout = Layout.of(pack.manifest, 2)
        shared, initial = Expert.initial(layout, seed=3), Expert.initial(layout, seed=SETTINGS["seed"])
        self._gained = shared.gained(initial, layout.blocks)
        self.device = Device(
            id="cam-01",
            backbone=backbone,
            dataset=dataset,
            cache=PrefixCache(folder / "cache", backbone, dataset, micro_batch=4),
            plan=Plan(2, 4, False, "f16", 1.0, 60.0, 1.0, 1.0, None, "job"),
            costs=COSTS,
            store=self.state.store("r1", "fedms"),
            progress=lambda _share, _loss: None,
        )

    def run(self, stage: Any, gate: Tensors | None = None) -> Outcome:
        """A round, after a restart."""
        return FedMS(self.device).run(Round(stage, 1, SETTINGS, {**self._gained, **(gate or {})}, Guard()))

    def model(self) -> Model:
        return Model.read(self.file, self.device.backbone.pack)


@pytest.fixture
def trainer(tiny_bert_pack: Pack, text_data: Path, tmp_path: Path) -> Trainer:
    return Trainer(tmp_path, tiny_bert_pack, text_data)


def private(model: Model) -> np.ndarray[Any, Any]:
    assert model.local is not None
    assert model.gate is not None
    return np.concatenate([model.local.vector, model.gate.tensors["gate.weight"].ravel()])


def test_a_device_goes_on_from_its_model_file(trainer: Trainer) -> None:
    trainer.run("personal")
    first = private(trainer.model())
    trainer.run("personal")
    second = private(trainer.model())
    assert np.abs(second - first).max() > 1e-3
    trainer.file.unlink()
    trainer.run("personal")  # the same round from the beginning: a copy of the global expert
    np.testing.assert_allclose(private(trainer.model()), first, atol=1e-6)


def test_the_evaluation_leaves_the_mixture_that_it_measured(trainer: Trainer) -> None:
    sent = trainer.run("personal").tensors
    before = trainer.model()
    mean = {name: tensor + 0.5 for name, tensor in sent.items()}  # with what other devices sent
    trainer.run("evaluate", mean)
    after = trainer.model()
    assert before.gate is not None
    assert after.gate is not None
    assert after.mixture is not None
    np.testing.assert_array_equal(private(after), private(before))
    np.testing.assert_array_equal(before.gate.tensors["gate.B"], sent["gate.B"])
    np.testing.assert_array_equal(after.gate.tensors["gate.B"], mean["gate.B"])
    assert (after.card.kind, after.card.run, after.card.job, after.card.boundary) == ("mixture", "r1", "fedms", 1)
    assert [path.name for path in trainer.file.parent.iterdir()] == [FILE]


def test_a_damaged_model_file_stops_the_round_and_says_what_to_do(trainer: Trainer) -> None:
    trainer.run("personal")
    trainer.file.write_bytes(trainer.file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=str(trainer.file)) as caught:
        trainer.run("personal")
    assert "delete it" in caught.value.remedy
