"""The differentiable graph builder against torch autograd: each rule, and random compositions of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fleetune[pack]'")
import onnxruntime  # noqa: E402

from fleetune.tools.pack.graph import Graph, Tensor  # noqa: E402

Arrays = Mapping[str, np.ndarray[Any, Any]]
sizes = st.integers(1, 6)
few = settings(max_examples=12)


def random(seed: int, *shapes: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(model: Any, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def compare(graph: Graph, leaves: Mapping[Tensor, Any], output: Tensor, reference: Any, wrt: Sequence[Tensor]) -> None:
    """Hold ``output`` and its gradients against ``reference``, a torch tensor made from ``leaves``."""
    seed = np.random.default_rng(9).standard_normal(tuple(reference.shape)).astype(np.float32)
    upstream = graph.input("upstream", output.shape)
    gradients = graph.gradients(output, upstream, wrt)
    outputs = {"y": output} | {f"grad.{leaf.name}": grad for leaf, grad in zip(wrt, gradients, strict=True)}
    model = graph.model("test", [*leaves, upstream], outputs)
    found = run(model, {leaf.name: value.detach().numpy() for leaf, value in leaves.items()} | {"upstream": seed})
    wanted = torch.autograd.grad(reference, [leaves[leaf] for leaf in wrt], torch.from_numpy(seed))
    np.testing.assert_allclose(found["y"], reference.detach().numpy(), rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(wrt, wanted, strict=True):
        scale = max(1.0, float(grad.abs().max()))
        np.testing.assert_allclose(found[f"grad.{leaf.name}"] / scale, grad.numpy() / scale, rtol=0, atol=1e-5)


def gate(u: Any) -> Any:
    return u * (1 + torch.erf(u))


def leaf(graph: Graph, name: str, array: np.ndarray[Any, Any]) -> tuple[Tensor, Any]:
    return graph.input(name, array.shape), torch.tensor(array, requires_grad=True)


def start(**arrays: np.ndarray[Any, Any]) -> tuple[Graph, dict[str, Tensor], dict[Tensor, Any]]:
    """A graph whose leaves are these arrays, and the same leaves in torch."""
    graph = Graph(sizes_from=Tensor("unused", ()))
    pairs = {name: leaf(graph, name, array) for name, array in arrays.items()}
    return graph, {name: pair[0] for name, pair in pairs.items()}, dict(pairs.values())


# --- each rule ----------------------------------------------------------------------------------------------


@few
@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.integers(0, 99))
def test_gemm(n: int, k: int, m: int, trans_a: bool, trans_b: bool, seed: int) -> None:
    a, b, c = random(seed, (k, n) if trans_a else (n, k), (m, k) if trans_b else (k, m), (n, m))
    graph, x, torched = start(a=a, b=b, c=c)
    y = graph.gemm(x["a"], x["b"], x["c"], trans_a=trans_a, trans_b=trans_b, alpha=-0.5, beta=1.5)
    ta, tb, tc = torched.values()
    reference = -0.5 * (ta.T if trans_a else ta) @ (tb.T if trans_b else tb) + 1.5 * tc
    compare(graph, torched, y, reference, list(torched))


def test_gemm_with_a_frozen_row_as_bias() -> None:
    a, b, c = random(0, (3, 4), (5, 4), (5,))
    graph, x, torched = start(a=a, b=b, c=c)
    y = graph.gemm(x["a"], x["b"], x["c"], trans_b=True)
    ta, tb, tc = torched.values()
    compare(graph, torched, y, ta @ tb.T + tc, [x["a"], x["b"]])


@few
@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
def test_matmul_over_batches(b: int, n: int, k: int, m: int, seed: int) -> None:
    graph, x, torched = start(**dict(zip("pq", random(seed, (b, 2, n, k), (b, 2, k, m)), strict=True)))
    compare(graph, torched, graph.matmul(x["p"], x["q"]), torch.matmul(*torched.values()), list(torched))


def test_matmul_with_a_frozen_operand_that_broadcasts() -> None:
    graph, x, torched = start(**dict(zip("pq", random(0, (1, 2, 4), (3, 4, 5)), strict=True)))
    compare(graph, torched, graph.matmul(x["p"], x["q"]), torch.matmul(*torched.values()), [x["q"]])


@few
@given(sizes, sizes, st.integers(0, 99))
def test_add_and_mul_of_equal_shapes(n: int, m: int, seed: int) -> None:
    a, b = random(seed, (n, m), (n, m))
    graph, x, torched = start(a=a, b=b)
    y = graph.add(graph.mul(x["a"], x["b"]), x["b"])
    ta, tb = torched.values()
    compare(graph, torched, y, ta * tb + tb, list(torched))


@few
@given(sizes, sizes, st.integers(0, 99))
def test_elementwise_operations_whose_axes_broadcast(n: int, m: int, seed: int) -> None:
    a, row, column, scalar = random(seed, (2, n, m), (m,), (n, 1), (1,))
    column += 3 * np.sign(column)  # it divides
    graph, x, torched = start(a=a, row=row, column=column, scalar=scalar)
    product = graph.mul(graph.add(graph.mul(x["a"], x["row"]), x["scalar"]), -1.5)
    y = graph.sub(graph.div(product, x["column"]), graph.mul(x["row"], x["column"]))
    ta, trow, tcolumn, tscalar = torched.values()
    compare(graph, torched, y, (ta * trow + tscalar) * -1.5 / tcolumn - trow * tcolumn, list(torched))


@few
@given(sizes, sizes, st.integers(0, 99))
def test_the_bias_of_a_product(n: int, m: int, seed: int) -> None:
    graph, x, torched = start(**dict(zip("abc", random(seed, (n, 3), (3, m), (m,)), strict=True)))
    y = graph.gemm(x["a"], x["b"], x["c"], beta=0.5)
    ta, tb, tc = torched.values()
    compare(graph, torched, y, ta @ tb + 0.5 * tc, list(torched))


@few
@given(st.sampled_from([(0,), (-1,), (0, 2), (1, 2), (0, 1, 2)]), st.booleans(), st.integers(0, 99))
def test_sums_and_means(axes: tuple[int, ...], keep: bool, seed: int) -> None:
    graph, x, torched = start(a=random(seed, (2, 3, 4))[0])
    total, mean = graph.sum(x["a"], *axes, keep=keep), graph.mean(x["a"], *axes, keep=keep)
    ta = torched[x["a"]]
    compare(graph, torched, graph.mul(total, mean), ta.sum(axes, keep) * ta.mean(axes, keep), [x["a"]])


def test_a_mean_over_an_axis_of_unknown_size() -> None:
    a = Tensor("a", ("b", 3))
    graph = Graph(sizes_from=a)
    y = graph.mul(graph.sub(a, graph.mean(a, 0)), a)
    upstream = graph.input("upstream", ("b", 3))
    (gradient,) = graph.gradients(y, upstream, [a])
    model = graph.model("mean", [a, upstream], {"grad": gradient})
    for batch in (1, 4):
        value, seed = random(batch, (batch, 3), (batch, 3))
        ta = torch.tensor(value, requires_grad=True)
        (wanted,) = torch.autograd.grad((ta - ta.mean(0, keepdim=True)) * ta, ta, torch.tensor(seed))
        np.testing.assert_allclose(run(model, {"a": value, "upstream": seed})["grad"], wanted.numpy(), atol=1e-6)


@few
@given(sizes, sizes, st.integers(0, 99))
def test_relu_sigmoid_and_root(n: int, m: int, seed: int) -> None:
    graph, x, torched = start(a=random(seed, (n, m))[0])
    y = graph.unary("Sqrt", graph.add(graph.unary("Sigmoid", graph.relu(x["a"])), 1.0))
    compare(graph, torched, y, (1 + torched[x["a"]].relu().sigmoid()).sqrt(), [x["a"]])


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.tuples(sizes, sizes), st.integers(0, 99))
def test_convolution(b: int, channels: int, out: int, kernel: tuple[int, int], seed: int) -> None:
    picture = (b, channels, kernel[0] + 3, kernel[1] + 2)
    graph, x, torched = start(
        **dict(zip(("p", "weight", "bias"), random(seed, picture, (out, channels, *kernel), (out,)), strict=True))
    )
    reference = torch.nn.functional.conv2d(*torched.values())
    compare(graph, torched, graph.conv(x["p"], x["weight"], x["bias"]), reference, list(torched))


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_halving(b: int, channels: int, rows: int, columns: int, seed: int) -> None:
    graph, x, torched = start(p=random(seed, (b, channels, 2 * rows, 2 * columns))[0])
    compare(graph, torched, graph.halve(x["p"]), torch.nn.functional.max_pool2d(torched[x["p"]], 2), [x["p"]])


def test_values_that_are_equally_large_share_the_gradient() -> None:
    graph, x, _ = start(p=np.zeros((1, 1, 2, 4), np.float32))
    upstream = graph.input("upstream", (1, 1, 1, 2))
    (gradient,) = graph.gradients(graph.halve(x["p"]), upstream, [x["p"]])
    model = graph.model("halve", [x["p"], upstream], {"grad": gradient})
    picture = np.array([[[[5, 5, 1, 2], [5, 5, 3, 0]]]], np.float32)
    found = run(model, {"p": picture, "upstream": np.array([[[[8, 6]]]], np.float32)})["grad"]
    np.testing.assert_array_equal(found, [[[[2, 2, 0, 0], [2, 2, 6, 0]]]])


@few
@given(sizes, sizes, st.integers(0, 99))
def test_gate(n: int, m: int, seed: int) -> None:
    graph, x, torched = start(a=3 * random(seed, (n, m))[0])
    compare(graph, torched, graph.gate(x["a"]), gate(torched[x["a"]]), [x["a"]])


@few
@given(sizes, sizes, st.integers(0, 99))
def test_softmax(n: int, m: int, seed: int) -> None:
    graph, x, torched = start(a=3 * random(seed, (2, n, m))[0])
    compare(graph, torched, graph.softmax(x["a"]), torched[x["a"]].softmax(-1), [x["a"]])


@few
@given(sizes, st.integers(2, 8), st.integers(0, 99))
def test_layer_norm(n: int, m: int, seed: int) -> None:
    a, weight, bias = random(seed, (n, m), (m,), (m,))
    graph, x, torched = start(a=a, weight=weight, bias=bias)
    y = graph.layer_norm(x["a"], x["weight"], x["bias"], 1e-3)
    reference = torch.nn.functional.layer_norm(torched[x["a"]], (m,), *map(torch.tensor, (weight, bias)), eps=1e-3)
    compare(graph, torched, y, reference, [x["a"]])


@few
@given(st.permutations(range(4)), st.permutations(range(4)), st.integers(0, 99))
def test_transposes_of_transposes(first: list[int], second: list[int], seed: int) -> None:
    graph, x, torched = start(a=random(seed, (2, 3, 4, 5))[0])
    y = graph.mul(graph.transpose(graph.transpose(x["a"], first), second), 2.0)
    compare(graph, torched, y, torched[x["a"]].permute(first).permute(second) * 2, [x["a"]])


def test_two_transposes_that_cancel_leave_nothing_behind() -> None:
    graph, x, _ = start(a=np.zeros((2, 3, 4), np.float32))
    assert graph.transpose(graph.transpose(x["a"], (2, 0, 1)), (1, 2, 0)) is x["a"]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 2, 6), (24,)])
def test_reshape(shape: tuple[int, ...]) -> None:
    graph, x, torched = start(a=random(0, (2, 3, 4))[0])
    y = graph.gate(graph.reshape(x["a"], shape))
    compare(graph, torched, y, gate(torched[x["a"]].reshape(shape)), [x["a"]])


# --- compositions -------------------------------------------------------------------------------------------


def test_a_leaf_that_is_used_twice_takes_the_sum_of_both_gradients() -> None:
    a, w = random(0, (3, 3), (3, 3))
    graph, x, torched = start(a=a, w=w)
    y = graph.mul(graph.mul(x["a"], x["a"]), graph.gemm(x["a"], x["w"]))
    ta, tw = torched.values()
    compare(graph, torched, y, ta * ta * (ta @ tw), list(torched))


def test_a_sum_below_a_product_passes_its_gradient_to_both_terms() -> None:
    a, b, w = random(0, (3, 4), (3, 4), (4, 4))
    graph, x, torched = start(a=a, b=b, w=w)
    y = graph.add(graph.gemm(graph.add(x["a"], x["b"]), x["w"]), x["a"])
    ta, tb, tw = torched.values()
    compare(graph, torched, y, (ta + tb) @ tw + ta, [x["a"], x["b"]])


def test_a_leaf_that_is_added_to_itself_below_a_product() -> None:
    a, w = random(0, (3, 4), (4, 4))
    graph, x, torched = start(a=a, w=w)
    y = graph.gemm(graph.add(x["a"], x["a"]), x["w"])
    ta, tw = torched.values()
    compare(graph, torched, y, (ta + ta) @ tw, [x["a"]])


FROZEN = random(7, (4, 4))[0]
STEPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "add": (lambda graph, a, b: graph.add(a, b), lambda a, b: a + b),
    "mul": (lambda graph, a, b: graph.mul(a, b), lambda a, b: a * b),
    "gemm": (lambda graph, a, b: graph.gemm(a, b), lambda a, b: a @ b),
    "gemm with a frozen matrix": (
        lambda graph, a, _: graph.gemm(a, graph.constant(FROZEN)),
        lambda a, _: a @ torch.tensor(FROZEN),
    ),
    "gemm on top": (lambda graph, a, b: graph.gemm(a, b, a, trans_b=True), lambda a, b: a @ b.T + a),
    "matmul": (lambda graph, a, b: graph.matmul(a, b), lambda a, b: a @ b),
    "gate": (lambda graph, a, _: graph.gate(a), lambda a, _: gate(a)),
    "softmax": (lambda graph, a, _: graph.softmax(a), lambda a, _: a.softmax(-1)),
    "transpose": (lambda graph, a, _: graph.transpose(a, (1, 0)), lambda a, _: a.T),
    "reshape": (
        lambda graph, a, _: graph.reshape(graph.gate(graph.reshape(a, (16,))), (4, 4)),
        lambda a, _: gate(a),
    ),
    "norm": (
        lambda graph, a, _: graph.layer_norm(
            a, graph.constant(np.ones(4, np.float32)), graph.constant(np.zeros(4, np.float32)), 1e-2
        ),
        lambda a, _: torch.nn.functional.layer_norm(a, (4,), eps=1e-2),
    ),
}


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), min_size=1, max_size=6))
def test_random_compositions(steps: list[tuple[str, int]]) -> None:
    graph, x, torched = start(**{name: array / 2 for name, array in zip("ab", random(0, (4, 4), (4, 4)), strict=True)})
    symbols, values = list(x.values()), list(torched.values())
    for name, earlier in steps:
        ours, theirs = STEPS[name]
        other = earlier % len(symbols)
        symbols.append(ours(graph, symbols[-1], symbols[other]))
        values.append(theirs(values[-1], values[other]))
    output, reference = graph.add(symbols[-1], x["a"]), values[-1] + values[0]
    reached = torch.autograd.grad(reference.sum(), list(torched.values()), retain_graph=True, allow_unused=True)
    wrt = [leaf for leaf, grad in zip(torched, reached, strict=True) if grad is not None]
    compare(graph, torched, output, reference, wrt)


# --- sizes that are known only at run time ------------------------------------------------------------------


def test_one_model_serves_every_batch_and_length() -> None:
    width, heads = 8, 2
    h = Tensor("h", ("b", "t", width))
    graph = Graph(sizes_from=h)
    w = graph.input("w", (width, width))
    mask = graph.input("mask", ("b", 1, "t"))
    upstream = graph.input("upstream", ("b", "t", width))
    flat = graph.gemm(graph.reshape(h, ("n", width)), w)
    split = graph.transpose(graph.reshape(flat, ("b", "t", heads, width // heads)), (0, 2, 1, 3))
    scores = graph.matmul(split, graph.transpose(split, (0, 1, 3, 2)))
    hidden = graph.add(graph.mul(mask, 1e9), graph.constant(np.float32(-1e9)))
    mixed = graph.matmul(graph.softmax(graph.add(scores, graph.unsqueeze(hidden, 1))), split)
    y = graph.add(graph.reshape(graph.transpose(mixed, (0, 2, 1, 3)), ("b", "t", width)), h)
    gradients = graph.gradients(y, upstream, [h, w])
    outputs = {"y": y, "grad.h": gradients[0], "grad.w": gradients[1]}
    model = graph.model("attention", [h, w, mask, upstream], outputs)
    for batch, length in ((1, 1), (2, 5), (5, 2)):
        a, weight, seed = random(batch, (batch, length, width), (width, width), (batch, length, width))
        shown = np.ones((batch, 1, length), np.float32)
        shown[0, 0, 1:] = 0
        ta, tw = (torch.tensor(array, requires_grad=True) for array in (a, weight))
        split_t = (ta @ tw).reshape(batch, length, heads, -1).transpose(1, 2)
        hidden_t = (torch.tensor(shown)[:, None] - 1) * 1e9
        reference = (split_t @ split_t.mT + hidden_t).softmax(-1) @ split_t
        reference = reference.transpose(1, 2).reshape(batch, length, width) + ta
        wanted = torch.autograd.grad(reference, [ta, tw], torch.tensor(seed))
        found = run(model, {"h": a, "w": weight, "mask": shown, "upstream": seed})
        np.testing.assert_allclose(found["y"], reference.detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(found["grad.h"], wanted[0].numpy(), atol=2e-5)
        np.testing.assert_allclose(found["grad.w"], wanted[1].numpy(), atol=1e-4)


# --- errors -------------------------------------------------------------------------------------------------


def test_an_operator_without_a_rule_is_named() -> None:
    graph, x, _ = start(a=np.zeros((2, 2), np.float32))
    y = graph.unary("Erf", x["a"])
    with pytest.raises(ValueError, match="Erf"):
        graph.gradients(y, graph.input("upstream", y.shape), [x["a"]])


def test_an_operator_that_onnx_does_not_know_is_refused() -> None:
    graph, x, _ = start(a=np.zeros((2, 2), np.float32))
    with pytest.raises(onnx.checker.ValidationError, match="Frobnicate"):
        graph.model("test", [x["a"]], {"y": graph.unary("Frobnicate", x["a"])})


def test_a_leaf_without_influence_is_named() -> None:
    graph, x, _ = start(a=np.zeros((2, 2), np.float32), lonely=np.zeros((2, 2), np.float32))
    y = graph.gate(x["a"])
    with pytest.raises(ValueError, match="lonely"):
        graph.gradients(y, graph.input("upstream", y.shape), [x["a"], x["lonely"]])


def test_a_leaf_that_is_not_among_the_inputs_is_named() -> None:
    graph, x, _ = start(a=np.zeros((2, 2), np.float32), forgotten=np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="forgotten"):
        graph.model("test", [x["a"]], {"y": graph.add(x["a"], x["forgotten"])})


def test_an_input_that_nothing_needs_is_not_in_the_model() -> None:
    graph, x, _ = start(a=np.zeros((2, 2), np.float32), unused=np.zeros((2, 2), np.float32))
    model = graph.model("test", list(x.values()), {"y": graph.gate(x["a"])})
    assert [value.name for value in model.graph.input] == ["a"]


def test_an_operand_of_a_product_that_broadcasts_takes_no_gradient() -> None:
    graph, x, _ = start(wide=np.zeros((3, 2, 2), np.float32), small=np.zeros((1, 2, 2), np.float32))
    y = graph.matmul(x["wide"], x["small"])
    with pytest.raises(ValueError, match="broadcast"):
        graph.gradients(y, graph.input("upstream", y.shape), [x["small"]])


def test_the_weights_of_a_normalisation_are_frozen() -> None:
    graph, x, _ = start(a=np.zeros((2, 4), np.float32), w=np.ones(4, np.float32), b=np.zeros(4, np.float32))
    y = graph.layer_norm(x["a"], x["w"], x["b"], 1e-5)
    with pytest.raises(ValueError, match="frozen"):
        graph.gradients(y, graph.input("upstream", y.shape), [x["w"]])
