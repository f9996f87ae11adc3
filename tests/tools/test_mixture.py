"""pFedMoE's graphs against torch: the gate, and a step of the mixture with each kind of private model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fleetune[pack]'")
import onnxruntime  # noqa: E402

from fleetune.edge.methods.pfedmoe.gate import gate_shapes, running_shapes  # noqa: E402
from fleetune.tools.pack.extractors import CNNS, SHARED_CNN, Cnn, DeepAveragingNetwork  # noqa: E402
from fleetune.tools.pack.mixture import (  # noqa: E402
    ALPHAS,
    extractor_graph,
    gate_graphs,
    network_graphs,
)
from fleetune.tools.pack.torch_networks import (  # noqa: E402
    TorchCnn,
    TorchGate,
    as_torch,
    load,
    parameters_of,
)

Arrays = Mapping[str, np.ndarray[Any, Any]]
INPUTS, HIDDEN = 7, 5
SMALL = Cnn((3, 4), 12, representation=6)


def run(model: Any, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


def random(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0.1, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def assert_close(found: Any, wanted: Any, what: str = "") -> None:
    scale = max(float(np.abs(wanted).max()), 1e-2)
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=2e-5, err_msg=what)


# --- the networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cnn-1", 2_621_558), ("cnn-2", 1_815_142), ("cnn-3", 1_320_558), ("cnn-4", 1_060_358), ("cnn-5", 670_058)],
)
def test_the_papers_networks_have_the_papers_parameters(name: str, parameters: int) -> None:
    header = CNNS[name].representation * 10 + 10
    assert sum(map(math.prod, CNNS[name].shapes.values())) + header == parameters


def test_what_is_shared_has_665048_parameters() -> None:
    assert sum(map(math.prod, SHARED_CNN.shapes.values())) == 665_048


def test_a_deep_averaging_network_sees_real_tokens_alone() -> None:
    network = DeepAveragingNetwork(embedding=8, hidden=6, representation=5)
    tensors = random({f"extractor.{name}": shape for name, shape in network.shapes.items()})
    (rows,) = random({"rows": (2, 4, 8)}, 1).values()
    mask = np.ones((2, 1, 4), np.float32)
    mask[1, 0, 2:] = 0
    found = run(extractor_graph(network), {**tensors, "sample": rows, "mask": mask})["representation"]
    weights = {name.removeprefix("extractor."): torch.tensor(tensor) for name, tensor in tensors.items()}
    for row, tokens in ((0, 4), (1, 2)):
        normal = torch.nn.functional.layer_norm(torch.tensor(rows[row, :tokens]), (8,))
        hidden = (normal @ weights["fc1.weight"] + weights["fc1.bias"]).relu().mean(0)
        wanted = hidden @ weights["fc2.weight"] + weights["fc2.bias"]
        np.testing.assert_allclose(found[row], wanted.numpy(), atol=1e-5)


# --- the gate -----------------------------------------------------------------------------------------------


def torch_gate(tensors: Arrays) -> tuple[Any, dict[str, Any]]:
    gate = TorchGate(INPUTS, HIDDEN)
    parameters = parameters_of(gate, "gate.")
    load(parameters, tensors)
    return gate, parameters


def test_the_gate_and_its_gradients() -> None:
    graphs, tensors = gate_graphs(INPUTS, HIDDEN), random(gate_shapes(INPUTS, HIDDEN))
    x, upstream = random({"x": (6, INPUTS), "gradient": (6, 2)}, 1).values()
    gate, parameters = torch_gate(tensors)
    wanted = gate(torch.tensor(x))
    found = run(graphs["gate_train"], {**tensors, "x": x})["alpha"]
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-6)
    gradients = run(graphs["gate_backward"], {**tensors, "x": x, "gradient": upstream})
    torched = torch.autograd.grad(wanted, list(parameters.values()), torch.tensor(upstream))
    assert gradients.keys() == {f"grad.{name}" for name in parameters}
    for name, gradient in zip(parameters, torched, strict=True):
        assert_close(gradients[f"grad.{name}"], as_torch(gradient.numpy()).numpy(), name)


def test_a_gate_that_is_not_trained_normalises_by_what_it_has_seen() -> None:
    graphs, tensors = gate_graphs(INPUTS, HIDDEN), random(gate_shapes(INPUTS, HIDDEN))
    (x,) = random({"x": (6, INPUTS)}, 1).values()
    seen = run(graphs["gate_train"], {**tensors, "x": x})
    running = {f"running.{name}": value for name, value in seen.items() if name != "alpha"}
    assert {name: value.shape for name, value in running.items()} == {
        f"running.{name}": shape for name, shape in running_shapes(INPUTS, HIDDEN).items()
    }
    np.testing.assert_allclose(
        run(graphs["gate"], {**tensors, **running, "x": x})["alpha"], seen["alpha"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_weights_sum_to_one(batch: int) -> None:
    tensors = random(gate_shapes(INPUTS, HIDDEN))
    (x,) = random({"x": (batch, INPUTS)}, 1).values()
    alpha = run(gate_graphs(INPUTS, HIDDEN)["gate_train"], {**tensors, "x": 100 * x})["alpha"]
    np.testing.assert_allclose(alpha.sum(axis=1), 1, rtol=0, atol=1e-6)


# --- the mixture --------------------------------------------------------------------------------------------


def network_case(batch: int = 5) -> dict[str, np.ndarray[Any, Any]]:
    shapes = {f"body.{name}": shape for name, shape in CNN_SHAPES.items()}
    shapes |= {f"extractor.{name}": shape for name, shape in SMALL.shapes.items()}
    shapes |= {"header.weight": (6, 3), "header.bias": (3,)}
    feeds = {name: tensor / 4 for name, tensor in random(shapes).items()}
    feeds |= random({"sample": (batch, 3, 32, 32), **dict.fromkeys(ALPHAS, (batch, 6))}, 1)
    return {**feeds, "labels": np.eye(3, dtype=np.float32)[np.arange(batch) % 3]}


BODY = Cnn((4, 2), 10, representation=6)
CNN_SHAPES = BODY.shapes


def test_a_step_of_two_networks_has_the_gradients_of_torch() -> None:
    feeds = network_case()
    body, shared, header = TorchCnn(BODY), TorchCnn(SMALL), torch.nn.Linear(6, 3)
    parameters = {
        **parameters_of(body, "body."),
        **parameters_of(shared, "extractor."),
        **parameters_of(header, "header."),
    }
    load(parameters, feeds)
    pictures = torch.tensor(feeds["sample"])
    alphas = {name: torch.tensor(feeds[name], requires_grad=True) for name in ALPHAS}
    logits = header(alphas["alpha.global"] * shared(pictures) + alphas["alpha.local"] * body(pictures))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(feeds["labels"]), reduction="sum")
    found = run(network_graphs(BODY, SMALL)["mixture"], feeds)
    assert_close(found["logits"], logits.detach().numpy())
    everything = parameters | alphas
    assert found.keys() == {"logits"} | {f"grad.{name}" for name in everything}
    for name, gradient in zip(everything, torch.autograd.grad(loss, list(everything.values())), strict=True):
        ours = gradient.numpy() if name in alphas else as_torch(gradient.numpy()).numpy()
        assert_close(found[f"grad.{name}"], ours, name)


def test_without_the_shared_network_it_is_the_private_one() -> None:
    feeds, graphs = network_case(), network_graphs(BODY, SMALL)
    feeds |= {"alpha.global": np.zeros((5, 6), np.float32), "alpha.local": np.ones((5, 6), np.float32)}
    found = run(graphs["mixture"], feeds)
    alone = run(graphs["body"], feeds)["representation"] @ feeds["header.weight"] + feeds["header.bias"]
    np.testing.assert_allclose(found["logits"], alone, atol=1e-5)
    for name in SMALL.shapes:
        assert not found[f"grad.extractor.{name}"].any()
