"""The gate of a mixture: its gradients against torch, and what a fresh one does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.engine.gate import ADAPTER, HEAD, Gate, mix
from fleetune.edge.protocol.errors import DataError

CLASSES, RANK, WIDTH = 4, 3, 10


def random_gate(seed: int) -> Gate:
    gate = Gate(WIDTH, RANK, seed=0)
    rng = np.random.default_rng(seed)
    for tensor in gate.tensors.values():
        tensor[...] = rng.normal(0, 0.5, tensor.shape)
    return gate


def inputs(seed: int, samples: int, size: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed + 100)
    pooled = (5 * rng.standard_normal((samples, WIDTH)) + 2).astype(np.float32)
    return (
        pooled,
        rng.standard_normal((samples, 2, size)).astype(np.float32),
        rng.integers(0, CLASSES, samples),
    )


def test_a_fresh_gate_weighs_both_experts_equally() -> None:
    pooled, _, _ = inputs(0, 7, CLASSES)
    np.testing.assert_array_equal(Gate(WIDTH, RANK, seed=4).weights(pooled), np.full((7, 2), 0.5))


def test_a_fresh_gate_is_the_same_on_every_device() -> None:
    one, two, other = Gate(WIDTH, RANK, seed=1), Gate(WIDTH, RANK, seed=1), Gate(WIDTH, RANK, seed=2)
    assert set(one.tensors) == set(ADAPTER) | set(HEAD)
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, two.tensors[name])
    assert (one.tensors["gate.A"] != other.tensors["gate.A"]).any()


def test_what_others_have_trained_is_added_to_the_adapter_alone() -> None:
    gate, before = random_gate(0), random_gate(0)
    rng = np.random.default_rng(1)
    shapes = {name: tensor.shape for name, tensor in gate.tensors.items()}
    gained = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    gate.add({**gained, "head.weight": np.zeros(3, np.float32)})
    for name, tensor in gate.tensors.items():
        wanted = before.tensors[name] + gained[name] if name in ADAPTER else before.tensors[name]
        np.testing.assert_array_equal(tensor, wanted)
    gate.add({})
    gate.add({"gate.B": -gained["gate.B"]})
    np.testing.assert_allclose(gate.tensors["gate.B"], before.tensors["gate.B"], atol=1e-6)


def test_a_difference_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match=r"gate\.A"):
        Gate(WIDTH, RANK, seed=0).add({"gate.A": np.zeros((WIDTH, RANK + 1), np.float32)})


@given(st.integers(0, 99), st.integers(1, 6), st.floats(1e-3, 1e4))
def test_weights_sum_to_one_and_are_not_negative(seed: int, samples: int, scale: float) -> None:
    pooled, _, _ = inputs(seed, samples, CLASSES)
    weights = random_gate(seed).weights(pooled * np.float32(scale))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights >= 0).all()


def test_weights_do_not_depend_on_the_level_of_the_hidden_states() -> None:
    pooled, _, _ = inputs(3, 5, CLASSES)
    gate = random_gate(3)
    np.testing.assert_allclose(gate.weights(100 * pooled + 7), gate.weights(pooled), atol=1e-4)


def test_a_hidden_state_without_any_contrast_gives_finite_weights() -> None:
    assert np.isfinite(random_gate(0).weights(np.full((2, WIDTH), 3, np.float32))).all()


def test_mixing_is_the_weighted_sum() -> None:
    experts = np.array([[[1, 2], [10, 20]], [[3, 4], [30, 40]]], np.float32)
    weights = np.array([[1, 0], [0.25, 0.75]], np.float32)
    assert mix(weights, experts).tolist() == [[1, 2], [23.25, 31]]


@settings(max_examples=25)
@given(st.sampled_from(["logits", "features"]), st.integers(0, 99), st.integers(1, 8))
def test_gradients_equal_torch(where: str, seed: int, samples: int) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
    gate = random_gate(seed)
    pooled, experts, labels = inputs(seed, samples, CLASSES if where == "logits" else WIDTH)
    rng = np.random.default_rng(seed)
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((WIDTH, CLASSES), (CLASSES,)))
    head = (weight, bias) if where == "features" else None
    loss, found = gate.gradients(pooled, experts, labels, head)

    t = {name: torch.tensor(tensor.astype(np.float64), requires_grad=True) for name, tensor in gate.tensors.items()}
    x = torch.tensor(pooled.astype(np.float64))
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    z = x + x @ t["gate.A"] @ t["gate.B"]
    weights = (z @ t["gate.weight"] + t["gate.bias"]).softmax(-1)
    mixed = (weights[:, :, None] * torch.tensor(experts.astype(np.float64))).sum(1)
    if head is not None:
        mixed = mixed @ torch.tensor(head[0].astype(np.float64)) + torch.tensor(head[1].astype(np.float64))
    wanted = torch.nn.functional.cross_entropy(mixed, torch.from_numpy(labels))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    assert set(found) == set(t)
    for name, symbol in t.items():
        np.testing.assert_allclose(found[name], symbol.grad.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_step_against_the_gradient_prefers_the_expert_that_is_right() -> None:
    pooled, _, labels = inputs(0, 20, CLASSES)
    right = 4 * np.eye(CLASSES, dtype=np.float32)[labels]
    gate = Gate(WIDTH, RANK, seed=0)
    experts = np.stack([-right, right], axis=1)
    before, gradients = gate.gradients(pooled, experts, labels, None)
    for name, tensor in gate.tensors.items():
        tensor -= gradients[name]
    after, _ = gate.gradients(pooled, experts, labels, None)
    assert after < before
    assert (gate.weights(pooled)[:, 1] > 0.5).mean() > 0.9
