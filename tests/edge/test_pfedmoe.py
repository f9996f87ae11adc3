"""pFedMoE on devices with different backbones: what is trained, what goes up, and what an answer is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fleetune.edge.agent.state import JobStore
from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import ImageDataset, read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.parameters import Parameters, initial
from fleetune.edge.methods.base import Device, Outcome, Round
from fleetune.edge.methods.local import LocalRun
from fleetune.edge.methods.pfedmoe.body import BackboneBody
from fleetune.edge.methods.pfedmoe.extractor import Extractor, samples_of
from fleetune.edge.methods.pfedmoe.gate import ElementGate, FixedGate, SampleGate
from fleetune.edge.methods.pfedmoe.method import MixtureLearner, PFedMoE, PFedMoESettings
from fleetune.edge.methods.pfedmoe.mixture import HEADER, Mixture
from fleetune.edge.methods.pfedmoe.model import SharedAnswers, SharedModel
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ModelError, PackError
from fleetune.edge.protocol.messages import Announcement
from fleetune.edge.protocol.modelfile import FILE, read_model_file, write_model_file
from fleetune.edge.resources.costs import Costs
from fleetune.edge.resources.guard import Guard
from fleetune.edge.resources.planner import Plan
from fleetune.edge.resources.trial import Trial

COSTS = Costs("p", "1", "1", "x", 1, "1 core", (Trial(1, 2, 8, False, 50.0, 50.0, 60.0, 0.01, 0.01, 1e-6, 1e-6),))
SETTINGS: dict[str, Any] = {
    "classes": 2, "seed": 0, "max_depth": 3, "depth": 2, "epochs": 3, "batch": 6, "optimiser": "adam",
    "learning_rate": 5e-3, "weight_decay": 0.0, "representation": 256, "shared_learning_rate": 2e-3,
    "gate_learning_rate": 1e-2, "gate": "sample", "gate_split": "train", "gate_epochs": 2,
}  # fmt: skip
Make = Callable[..., Device]


@pytest.fixture
def make(text_data: Path, tmp_path: Path) -> Make:
    def make(pack: Pack, *, folder: str = "device", recompute: bool = False, micro_batch: int = 4) -> Device:
        data, backbone, state = read_dataset(text_data, pack), Backbone(pack, threads=1), tmp_path / folder
        return Device(
            id="cam-01",
            backbone=backbone,
            dataset=data,
            cache=PrefixCache(state / "cache", backbone, data, micro_batch=4),
            plan=Plan(2, micro_batch, recompute, "f16", 1.0, 60.0, 1.0, 1.0, None),
            costs=COSTS,
            store=JobStore(state / "private", "r1", "job"),
            progress=lambda _share, _loss: None,
        )

    return make


def settings(**changes: Any) -> PFedMoESettings:
    return PFedMoESettings(**{**SETTINGS, **changes})


def mixture_on(device: Device, gate: Any = None) -> Mixture:
    """A mixture whose parameters are all away from where they begin."""
    backbone, manifest = device.backbone, device.backbone.pack.manifest
    assert manifest.extractor is not None
    rng, width = np.random.default_rng(3), manifest.extractor.representation
    layout = Layout.of(manifest, width)
    expert = Expert(layout, rng.normal(0, 0.1, layout.size).astype(np.float32))
    expert.vector[: layout.tail(2).start] = 0  # what is frozen
    pooled = device.cache.prefix(0, expert).pooled
    run = LocalRun(device, settings(), expert)
    header = initial(dict(zip(HEADER, ((width, 2), (2,)), strict=True)), 1)
    shared = initial(manifest.extractor.shapes, 2)
    gate = gate or SampleGate(backbone.sessions, manifest.width, manifest.extractor.gate, width, 0)
    gate.load({"gate.norm2.weight": np.array([0.7, -0.4], np.float32)})
    extractor = Extractor(backbone.sessions, shared, samples_of(device.dataset, backbone), chunk=4)
    return Mixture(extractor, BackboneBody(run, expert), header, gate, pooled.__getitem__)


def gradients(mixture: Mixture, batch: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Of a step on some samples, by the names of what is trained."""
    mixture.gradient(batch, np.arange(len(batch)) % 2)
    found: dict[str, Parameters] = {
        "": mixture.extractor.gradient,
        "body.": mixture.body.gradient,
        ".": mixture.header_gradient,
        "..": mixture.gate.gradient,
    }
    return {f"{where}{name}": tensor.copy() for where, one in found.items() for name, tensor in one.tensors.items()}


def error(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-6))


# --- the gradient -------------------------------------------------------------------------------------------


def test_block_by_block_and_in_parts_the_gradient_is_that_of_the_whole_batch(
    make: Make, sharing_packs: tuple[Pack, Pack]
) -> None:
    batch = np.arange(9)
    wanted = gradients(mixture_on(make(sharing_packs[0], micro_batch=16)), batch)
    for changes in ({"micro_batch": 4}, {"micro_batch": 2, "recompute": True}):
        found = gradients(mixture_on(make(sharing_packs[0], **changes)), batch)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            if np.abs(gradient).max() > 1e-6:  # biases before a normalisation have none
                assert error(found[name], gradient) < 2e-4, (name, changes)


def test_the_gradient_is_torchs(make: Make, sharing_packs: tuple[Pack, Pack], bert_reference: Any) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
    from fleetune.tools.pack.torch_networks import TorchGate, as_torch, load, parameters_of

    device = make(sharing_packs[0], micro_batch=16)
    mixture, batch = mixture_on(device), np.arange(8)
    labels = torch.tensor(np.arange(8) % 2)
    hidden, mask = (torch.tensor(np.array(part)) for part in device.cache.prefix(1, mixture.body.learned).batch(batch))
    gate = TorchGate(64, 128)
    of_gate = parameters_of(gate, "gate.")
    load(of_gate, mixture.gate.learned.tensors)
    alpha = gate(torch.tensor(device.cache.prefix(0, mixture.body.learned).pooled[batch]))
    learned = {**mixture.extractor.learned.tensors, **mixture.header.tensors}
    body = mixture.body.learned.active(2) if isinstance(mixture.body.learned, Expert) else {}
    leaves = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in {**learned, **body}.items()}
    rows = torch.tensor(device.dataset.rows(device.backbone, batch))
    rows = torch.nn.functional.layer_norm(rows, (64,))
    tokens = (rows @ leaves["extractor.fc1.weight"] + leaves["extractor.fc1.bias"]).relu()
    mean = (tokens * mask[:, 0, :, None]).sum(1) / mask.sum(2)
    shared = mean @ leaves["extractor.fc2.weight"] + leaves["extractor.fc2.bias"]
    features = bert_reference.features(hidden, mask, range(1, 3), {n: leaves[n] for n in body if "head" not in n})
    private = features @ leaves["head.weight"] + leaves["head.bias"]
    mixed = alpha[:, :1] * shared + alpha[:, 1:] * private
    logits = mixed @ leaves["header.weight"] + leaves["header.bias"]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    everything = {**leaves, **of_gate}
    wanted = dict(zip(everything, torch.autograd.grad(loss, list(everything.values())), strict=True))
    summed = mixture.gradient(batch, labels.numpy())
    assert summed / 8 == pytest.approx(float(loss.detach()), rel=1e-4)
    found = {
        **mixture.extractor.gradient.tensors,
        **mixture.header_gradient.tensors,
        **mixture.body.gradient.tensors,
        **mixture.gate.gradient.tensors,
    }
    for name, gradient in wanted.items():
        one = as_torch(gradient.numpy()).numpy() if name in of_gate else gradient.numpy()
        if np.abs(one).max() > 1e-6:
            assert error(found[name], one) < 3e-3, name


@pytest.mark.parametrize("batch", [1, 5])
def test_every_part_learns_even_from_a_last_batch_of_one(
    batch: int, make: Make, sharing_packs: tuple[Pack, Pack]
) -> None:
    mixture = mixture_on(make(sharing_packs[1]))
    found = gradients(mixture, np.arange(batch))
    for part in ("extractor.fc1.weight", "body.blocks.1.query.A", "body.head.weight", ".header.weight"):
        assert np.abs(found[part]).max() > 1e-6
    reached = np.abs(found["..gate.norm2.bias"]).max()
    assert reached > 1e-6
    assert all(np.isfinite(one).all() for one in found.values())


# --- what an answer is made of ------------------------------------------------------------------------------


class Forced(FixedGate):
    """Weights that a test chooses."""

    def __init__(self, width: int, shared: float) -> None:
        super().__init__(width)
        self.shared = shared

    def weights(self, x: Any) -> Any:
        one = np.full((len(x), self._width), self.shared, dtype=np.float32)
        return one, 1 - one


def test_with_all_weight_on_the_private_model_it_is_that_model(make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    mixture = mixture_on(make(sharing_packs[0]), Forced(256, 0.0))
    scores = mixture.scores(np.arange(24))
    np.testing.assert_array_equal(scores.mixture, scores.private)
    assert error(scores.shared, scores.private) > 0.1
    gradient = gradients(mixture, np.arange(6))
    assert not any(one.any() for name, one in gradient.items() if name.startswith("extractor."))
    assert gradient["body.head.weight"].any()


def test_an_answer_depends_on_the_gate(make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    mixture = mixture_on(make(sharing_packs[0]))
    before = mixture.scores(np.arange(24))
    mixture.gate.load({"gate.norm2.bias": np.array([9, -9], np.float32)})
    after = mixture.scores(np.arange(24))
    np.testing.assert_allclose(after.mixture, after.shared, atol=1e-3)
    assert error(before.mixture, after.mixture) > 0.05


def test_an_element_gate_begins_with_halves_and_learns() -> None:
    gate, rng = ElementGate(4), np.random.default_rng(0)
    shared, private = gate.weights(np.zeros((3, 7), np.float32))
    assert shared.shape == (3, 4)
    assert (shared == 0.5).all()
    upstream = rng.standard_normal((2, 3, 4)).astype(np.float32)
    gate.backward(np.zeros((3, 7), np.float32), (upstream[0], upstream[1]))
    step = 1e-3
    for element in range(4):  # the slope of Σ upstream · α, by differences
        gate.learned.vector[element] = step
        shared, private = gate.weights(np.zeros((3, 7), np.float32))
        rise = ((shared - 0.5) * upstream[0] + (private - 0.5) * upstream[1]).sum() / step
        assert gate.gradient.vector[element] == pytest.approx(rise, rel=1e-2, abs=1e-3)
        gate.learned.vector[element] = 0


def test_a_fresh_gate_weighs_both_equally(sharing_packs: tuple[Pack, Pack]) -> None:
    gate = SampleGate(Backbone(sharing_packs[0], threads=1).sessions, 64, 128, 256, seed=5)
    x = np.random.default_rng(0).standard_normal((7, 64), dtype=np.float32)
    for weights in (gate.forward(x), gate.weights(x)):
        np.testing.assert_array_equal(np.stack(weights), np.full((2, 7, 256), 0.5, np.float32))


# --- rounds -------------------------------------------------------------------------------------------------


def play(device: Device, rounds: int, tensors: Any = None, **changes: Any) -> list[Outcome]:
    """Rounds of one device; what it adds to the extractor is all that is added to it."""
    method, found, total = PFedMoE(device), list[Outcome](), dict(tensors or {})
    given = {**SETTINGS, **changes}
    method.run(Round("prepare", 0, given, {}, Guard()))
    for number in range(1, rounds + 1):
        found.append(method.run(Round("train", number, given, total, Guard())))
        total = {name: total.get(name, 0) + tensor for name, tensor in found[-1].tensors.items()}
    return found


def test_two_backbones_send_the_same_tensors_and_no_others(make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    for pack, name in zip(sharing_packs, ("large", "small"), strict=True):
        (outcome,) = play(make(pack, folder=name), 1)
        manifest = pack.manifest
        assert manifest.extractor is not None
        assert {name: tensor.shape for name, tensor in outcome.tensors.items()} == manifest.extractor.shapes
        assert all(tensor.any() for tensor in outcome.tensors.values())
        assert outcome.depth == 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"gate": "fixed"}, {"gate": "element"}, {"gate_split": "val"}],
    ids=lambda one: str(one) or "default",
)
def test_a_device_learns_its_task(changes: Any, make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    outcomes = play(make(sharing_packs[1]), 5, **changes)
    losses = [float(outcome.metrics["loss"]) for outcome in outcomes]
    assert losses[-1] < 0.5 * losses[0]
    last = outcomes[-1].metrics
    assert last["test"] == last["test_mixture"]
    assert 0 < float(last["gate_local"]) < 1


def test_a_gate_with_samples_of_its_own_learns_from_no_others(make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    device = make(sharing_packs[1])
    mixture = mixture_on(device)
    learner = MixtureLearner(mixture, settings(gate_split="val"), device.dataset.labels)
    learner.narrow(2)
    before = mixture.gate.learned.vector.copy()
    assert isinstance(mixture.body, BackboneBody)
    learner.step(mixture.body.run, 0, np.arange(6))
    np.testing.assert_array_equal(mixture.gate.learned.vector, before)
    theta = mixture.extractor.learned.vector.copy()
    learner.step_gate(device.dataset, device.dataset.indices("val"))
    assert (mixture.gate.learned.vector != before).any()
    np.testing.assert_array_equal(mixture.extractor.learned.vector, theta)


def test_a_restarted_device_goes_on_with_its_private_parts(make: Make, sharing_packs: tuple[Pack, Pack]) -> None:
    whole = play(make(sharing_packs[1], folder="one"), 2)
    (first,) = play(make(sharing_packs[1], folder="two"), 1)
    restarted = PFedMoE(make(sharing_packs[1], folder="two"))
    again = restarted.run(Round("train", 2, SETTINGS, first.tensors, Guard()))
    assert again.metrics == whole[1].metrics
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor, whole[1].tensors[name])


def test_a_device_begins_a_round_with_the_extractor_that_came_down(
    make: Make, sharing_packs: tuple[Pack, Pack]
) -> None:
    manifest = sharing_packs[1].manifest
    assert manifest.extractor is not None
    far = {name: np.full(shape, 3.0, np.float32) for name, shape in manifest.extractor.shapes.items()}
    device = make(sharing_packs[1])
    (outcome,) = play(device, 1, far)
    kept = SharedModel.read(device.store.folder / FILE, device.backbone.pack, device.backbone.sessions)
    start = initial(manifest.extractor.shapes, 0).tensors
    for name, gained in outcome.tensors.items():
        np.testing.assert_allclose(kept.extractor.tensors[name], start[name] + 3 + gained, atol=1e-5)


# --- the model file -----------------------------------------------------------------------------------------


@pytest.fixture(params=["sample", "element", "fixed"])
def trained(request: pytest.FixtureRequest, make: Make, sharing_packs: tuple[Pack, Pack]) -> tuple[Device, Outcome]:
    """A device after two rounds, and what it measured in the last."""
    device = make(sharing_packs[1])
    return device, play(device, 2, gate=request.param)[-1]


@pytest.mark.parametrize("expert", ["mixture", "global", "local"])
def test_the_model_file_answers_as_was_measured(expert: str, trained: tuple[Device, Outcome]) -> None:
    device, outcome = trained
    answers = SharedAnswers(device.store.folder / FILE, device.backbone.pack, expert, threads=1)
    test = device.dataset.indices("test")
    found = answers.samples(device.dataset, test)
    right = (found.logits.argmax(axis=1) == device.dataset.labels[test]).mean()
    assert right == outcome.metrics[f"test_{expert}"]
    if expert == "mixture":
        assert found.gate is not None
        np.testing.assert_allclose(found.gate.sum(axis=1), 1, atol=1e-6)
        assert found.gate[:, 1].mean() == pytest.approx(float(outcome.metrics["gate_local"]), abs=1e-3)
    else:
        assert found.gate is None


def test_pictures_are_answered_as_the_data_file_s(
    sharing_dinov2_pack: Pack, picture_data: Path, tmp_path: Path
) -> None:
    backbone, data = Backbone(sharing_dinov2_pack, threads=1), read_dataset(picture_data, sharing_dinov2_pack)
    store = JobStore(tmp_path / "private", "r1", "job")
    plan = Plan(2, 4, recompute=False, cache="f16", cache_mib=1.0, peak_mib=60.0, cpu_s=1.0, seconds=1.0, joules=None)
    cache = PrefixCache(tmp_path / "cache", backbone, data, micro_batch=4)
    device = Device("cam-01", backbone, data, cache, plan, COSTS, store, lambda _share, _loss: None)
    outcome = play(device, 1, representation=500)[-1]
    assert outcome.tensors["extractor.conv1.weight"].any()
    answers = SharedAnswers(store.folder / FILE, sharing_dinov2_pack, "mixture", threads=1)
    test = data.indices("test")
    found = answers.samples(data, test)
    assert (found.logits.argmax(axis=1) == data.labels[test]).mean() == outcome.metrics["test"]
    assert isinstance(data, ImageDataset)
    np.testing.assert_allclose(answers.pictures(data.images[test]).logits, found.logits, atol=1e-4)


def test_a_model_file_of_another_extractor_is_refused(
    trained: tuple[Device, Outcome], sharing_packs: tuple[Pack, Pack], tiny_bert_pack: Pack
) -> None:
    file = trained[0].store.folder / FILE
    with pytest.raises(ModelError, match="was trained on"):
        SharedAnswers(file, sharing_packs[0], "mixture")
    with pytest.raises(ModelError, match="was trained on"):
        SharedAnswers(file, tiny_bert_pack, "mixture")


def test_a_damaged_model_file_is_named(trained: tuple[Device, Outcome]) -> None:
    device, _ = trained
    file = device.store.folder / FILE
    card, tensors = read_model_file(file)
    for damage, what in (
        ({"header.bias": np.zeros(5, np.float32)}, "header.bias"),
        ({"stray": np.zeros(1, np.float32)}, "stray"),
    ):
        write_model_file(file, card, {**tensors, **damage})
        with pytest.raises(ModelError, match=what):
            SharedAnswers(file, device.backbone.pack, "mixture")
    write_model_file(file, card, {name: tensor for name, tensor in tensors.items() if name != "header.weight"})
    with pytest.raises(ModelError, match=r"header\.weight is missing"):
        SharedAnswers(file, device.backbone.pack, "mixture")


# --- packs that do not fit ----------------------------------------------------------------------------------


def announced(pack: Pack, **changes: Any) -> Announcement:
    shared = pack.manifest.extractor
    sha256 = "0" * 64 if shared is None else shared.sha256
    found = Announcement("lab", "r1", "pfedmoe", 1, "pfedmoe", "train", 1, 2, sha256, "", SETTINGS, 1.0, 2.0)
    return msgspec.structs.replace(found, **changes)


def test_packs_of_different_backbones_fit_one_job(sharing_packs: tuple[Pack, Pack]) -> None:
    large, small = sharing_packs
    assert large.manifest.backbone.sha256 != small.manifest.backbone.sha256
    assert (large.manifest.blocks, small.manifest.blocks) == (3, 2)
    for pack in sharing_packs:
        PFedMoE.check_fit(pack, announced(large))


def test_a_pack_without_an_extractor_is_refused(tiny_bert_pack: Pack) -> None:
    with pytest.raises(PackError, match="has none") as caught:
        PFedMoE.check_fit(tiny_bert_pack, announced(tiny_bert_pack))
    assert "--extractor" in caught.value.remedy


def test_representations_of_another_width_are_refused(sharing_packs: tuple[Pack, Pack]) -> None:
    with pytest.raises(PackError, match=r"width 500.*256"):
        PFedMoE.check_fit(sharing_packs[0], announced(sharing_packs[0], settings={**SETTINGS, "representation": 500}))


def test_another_extractor_is_refused(sharing_packs: tuple[Pack, Pack]) -> None:
    with pytest.raises(PackError, match="shares the extractor"):
        PFedMoE.check_fit(sharing_packs[0], announced(sharing_packs[0], backbone="ab" * 32))
