"""A small differentiable builder of ONNX graphs.

A device has ONNX Runtime but no autograd, so the backward pass is worked out here, once, and shipped as a graph.
:class:`Graph` records operations on symbolic tensors; :meth:`Graph.gradients` appends the reverse sweep
(reverse-mode differentiation, one rule for each operator); :meth:`Graph.model` cuts any part of the record out
as an ONNX model. Batch and sequence stay symbolic, so one graph serves every micro-batch and length.

Only the operators that Fleetune's models need are here. Each rule is checked against torch autograd in
``tests/tools/test_graph.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
IR_VERSION = 9

_PARTS = 4
"""In how many parts pictures are taken where a convolution's weights get their gradient."""

Shape = tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A symbolic tensor: its name in the graph and its shape, where a ``str`` is a size known only at run time."""

    name: str
    shape: Shape
    dtype: int = TensorProto.FLOAT


@dataclass(frozen=True, eq=False)
class _Node:
    op: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    rule: str = ""  # name of its gradient rule, where it is not the operator's


class Graph:
    """Records operations and differentiates them.

    Args:
        sizes_from: The tensor whose leading axes give the symbolic sizes at run time, batch first, then sequence.

    Attributes:
        sizes_from: The same; a graph whose input has other axes sets it once it has computed such a tensor.
    """

    def __init__(self, sizes_from: Tensor) -> None:
        self.sizes_from = sizes_from
        self._nodes: list[_Node] = []
        self._producer: dict[Tensor, _Node] = {}
        self._constants: dict[Tensor, NDArray[Any]] = {}
        self._weights: set[Tensor] = set()

    # --- leaves -------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Shape, dtype: int = TensorProto.FLOAT) -> Tensor:
        """Declare a graph input."""
        return Tensor(name, shape, dtype)

    def weight(self, name: str, shape: Shape) -> Tensor:
        """Declare a float32 constant whose values the runtime is given when it opens the graph."""
        tensor = Tensor(name, shape)
        self._weights.add(tensor)
        return tensor

    def constant(self, value: NDArray[Any] | float, name: str | None = None) -> Tensor:
        """Embed a value; floating-point values become float32."""
        array = np.asarray(value, dtype=np.float32) if np.asarray(value).dtype.kind == "f" else np.asarray(value)
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = Tensor(name or f"c{len(self._constants)}", tuple(array.shape), dtype)
        self._constants[tensor] = array
        return tensor

    # --- operators ----------------------------------------------------------------------------------------------

    def _add(self, op: str, inputs: Sequence[Tensor], shapes: Sequence[Shape], **attributes: Any) -> tuple[Tensor, ...]:
        dtype = {"Shape": TensorProto.INT64, "Cast": TensorProto.FLOAT}.get(op, inputs[0].dtype)
        stem = f"{op.lower()}{len(self._nodes)}"
        outputs = tuple(Tensor(f"{stem}_{i}" if i else stem, shape, dtype) for i, shape in enumerate(shapes))
        node = _Node(op, tuple(inputs), outputs, attributes)
        self._nodes.append(node)
        self._producer.update(dict.fromkeys(outputs, node))
        return outputs

    def gemm(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None = None,
        *,
        trans_a: bool = False,
        trans_b: bool = False,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> Tensor:
        """``alpha · op(a) @ op(b) + beta · bias`` of two matrices, where ``op`` transposes on demand."""
        rows = a.shape[1] if trans_a else a.shape[0]
        columns = b.shape[0] if trans_b else b.shape[1]
        inputs = (a, b) if bias is None else (a, b, bias)
        flags = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
        return self._add("Gemm", inputs, [(rows, columns)], **flags)[0]

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched product over the last two axes; the leading axes of ``a`` and ``b`` are equal or 1."""
        batch = tuple(y if x == 1 else x for x, y in zip(a.shape[:-2], b.shape[:-2], strict=True))
        return self._add("MatMul", (a, b), [(*batch, a.shape[-2], b.shape[-1])])[0]

    def add(self, a: Tensor, b: Tensor | float) -> Tensor:
        """Elementwise sum; axes broadcast."""
        return self._elementwise("Add", a, b)

    def mul(self, a: Tensor, b: Tensor | float) -> Tensor:
        """Elementwise product; axes broadcast."""
        return self._elementwise("Mul", a, b)

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        """Elementwise difference; axes broadcast."""
        return self._elementwise("Sub", a, b)

    def div(self, a: Tensor, b: Tensor | float) -> Tensor:
        """Elementwise quotient; axes broadcast."""
        return self._elementwise("Div", a, b)

    def _elementwise(self, op: str, a: Tensor, b: Tensor | float) -> Tensor:
        other = b if isinstance(b, Tensor) else self.constant(np.float32(b))
        return self._add(op, (a, other), [_broadcast(a.shape, other.shape)])[0]

    def gate(self, u: Tensor) -> Tensor:
        """``u (1 + erf u)``, which is ``√2 gelu(√2 u)`` (Hendrycks and Gimpel, 2016)."""
        gated = self.mul(u, self.add(self.unary("Erf", u), 1.0))
        node = replace(self._producer[gated], rule="Gate")
        self._nodes[-1] = self._producer[gated] = node
        return gated

    def sub_from(self, value: float, a: Tensor) -> Tensor:
        """A constant less a tensor; without a gradient rule."""
        return self._add("Sub", (self.constant(np.float32(value)), a), [a.shape])[0]

    def unary(self, op: str, a: Tensor) -> Tensor:
        """Any elementwise operator, such as ``Exp``."""
        return self._add(op, (a,), [a.shape])[0]

    def sum(self, a: Tensor, *axes: int, keep: bool = True) -> Tensor:
        """Sum over some axes, which stay with size 1 or go."""
        return self._reduce("ReduceSum", a, axes, keep=keep)

    def mean(self, a: Tensor, *axes: int, keep: bool = True) -> Tensor:
        """Mean over some axes, which stay with size 1 or go."""
        return self._reduce("ReduceMean", a, axes, keep=keep)

    def _reduce(self, op: str, a: Tensor, axes: Sequence[int], *, keep: bool) -> Tensor:
        gone = sorted(axis % len(a.shape) for axis in axes)
        shape = tuple(1 if i in gone else size for i, size in enumerate(a.shape) if keep or i not in gone)
        where = self.constant(np.array(gone, dtype=np.int64))
        return self._add(op, (a, where), [shape], keepdims=int(keep))[0]

    def softmax(self, a: Tensor) -> Tensor:
        """Softmax over the last axis."""
        return self._add("Softmax", (a,), [a.shape], axis=-1)[0]

    def layer_norm(self, a: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Layer normalisation over the last axis (Ba et al., 2016)."""
        statistics = (*a.shape[:-1], 1)
        return self._add(
            "LayerNormalization", (a, weight, bias), [a.shape, statistics, statistics], axis=-1, epsilon=epsilon
        )[0]

    def transpose(self, a: Tensor, permutation: Sequence[int]) -> Tensor:
        """Permute the axes; transposes of transposes collapse into one."""
        producer = self._producer.get(a)
        if producer is not None and producer.op == "Transpose":
            inner: Sequence[int] = producer.attributes["perm"]
            return self.transpose(producer.inputs[0], [inner[i] for i in permutation])
        if list(permutation) == list(range(len(a.shape))):
            return a
        return self._add("Transpose", (a,), [tuple(a.shape[i] for i in permutation)], perm=list(permutation))[0]

    def reshape(self, a: Tensor, shape: Shape) -> Tensor:
        """Reshape; one symbolic size is inferred, several are read from ``sizes_from`` at run time."""
        lead = sum(isinstance(size, str) for size in shape)
        if lead > 1:
            sizes = self._add("Shape", (self.sizes_from,), [(lead,)], start=0, end=lead)[0]
            rest = self.constant(np.array(shape[lead:], dtype=np.int64))
            target = self._add("Concat", (sizes, rest), [(len(shape),)], axis=0)[0]
        else:
            target = self.constant(np.array([-1 if isinstance(s, str) else s for s in shape], dtype=np.int64))
        return self._add("Reshape", (a, target), [shape])[0]

    def twice(self, a: Tensor) -> Tensor:
        """The tensor and itself once more, along the first axis, whose size must be symbolic."""
        return self._add("Concat", (a, a), [a.shape], axis=0)[0]

    def unsqueeze(self, a: Tensor, axis: int) -> Tensor:
        """Insert an axis of size 1."""
        axes = self.constant(np.array([axis], dtype=np.int64))
        return self._add("Unsqueeze", (a, axes), [(*a.shape[:axis], 1, *a.shape[axis:])])[0]

    def expand(self, a: Tensor, like: Tensor) -> Tensor:
        """A tensor broadcast to the shape of another one; without a gradient rule."""
        return self._add("Expand", (a, self._add("Shape", (like,), [(len(like.shape),)])[0]), [like.shape])[0]

    def size(self, a: Tensor, axis: int) -> Tensor:
        """The size [1] of an axis as float32."""
        return self.floats(self._add("Shape", (a,), [(1,)], start=axis, end=axis + 1)[0])

    def values(self, constant: Tensor) -> list[int]:
        """The whole numbers of a constant."""
        return [int(number) for number in self._constants[constant]]

    def slice(self, a: Tensor, bounds: Mapping[int, tuple[int, int]]) -> Tensor:
        """``a[:, start:end]`` for axis → (start, end), both from zero up; without a gradient rule."""
        starts, ends = zip(*bounds.values(), strict=True)
        where = [self.constant(np.array(numbers, dtype=np.int64)) for numbers in (starts, ends, tuple(bounds))]
        shape = tuple(bounds[i][1] - bounds[i][0] if i in bounds else size for i, size in enumerate(a.shape))
        return self._add("Slice", (a, *where), [shape])[0]

    def parts(self, a: Tensor, count: int) -> list[Tensor]:
        """Rows of ``a`` in so many parts of equal size, the last ones shorter or empty; without a gradient rule."""
        rows = self._add("Shape", (a,), [(1,)], start=0, end=1)[0]
        axis = self.constant(np.array([0], dtype=np.int64))
        more, by = (self.constant(np.array([number], dtype=np.int64)) for number in (count - 1, count))
        size = self._add("Div", (self._add("Add", (rows, more), [(1,)])[0], by), [(1,)])[0]
        edges = [
            self._add("Mul", (size, self.constant(np.array([i], dtype=np.int64))), [(1,)])[0] for i in range(count + 1)
        ]
        return [self._add("Slice", (a, *edge, axis), [("part", *a.shape[1:])])[0] for edge in itertools.pairwise(edges)]

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors one after the other along an axis of known size; without a gradient rule."""
        size = sum(int(part.shape[axis]) for part in parts)
        shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
        return self._add("Concat", parts, [shape], axis=axis)[0]

    # --- convolutional networks, pictures being [b, channels, height, width] -------------------------------------

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolution without padding, stride 1: weight [out, in, height, width], bias [out]."""
        sides = [int(size) - int(kernel) + 1 for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)]
        return self._add("Conv", (x, weight, bias), [(x.shape[0], weight.shape[0], *sides)])[0]

    def halve(self, x: Tensor) -> Tensor:
        """The largest value of each square of 2 by 2; height and width must be even."""
        return self._pool("MaxPool", x)

    def _pool(self, op: str, x: Tensor) -> Tensor:
        sides = [int(size) // 2 for size in x.shape[2:]]
        return self._add(op, (x,), [(*x.shape[:2], *sides)], kernel_shape=[2, 2], strides=[2, 2])[0]

    def largest(self, x: Tensor, halved: Tensor) -> Tensor:
        """How much of each square's largest value each of its values is: 1, or equal shares of what is equally large.

        Without a gradient rule.
        """
        marks = self.floats(self._add("Equal", (x, self.double(halved)), [x.shape])[0])
        return self.div(marks, self.double(self.mul(self._pool("AveragePool", marks), 4.0)))

    def double(self, x: Tensor) -> Tensor:
        """Each value as a square of 2 by 2; without a gradient rule."""
        corners, scales = (self.constant(np.array(numbers, dtype=np.float32)) for numbers in ((), (1, 1, 2, 2)))
        shape = (*x.shape[:2], *(2 * int(size) for size in x.shape[2:]))
        how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return self._add("Resize", (x, corners, scales), [shape], **how)[0]

    def relu(self, x: Tensor) -> Tensor:
        """``max(x, 0)``."""
        return self.unary("Relu", x)

    def conv_transpose(self, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of :meth:`conv` with respect to its input; without a gradient rule."""
        sides = [int(size) + int(kernel) - 1 for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)]
        return self._add("ConvTranspose", (x, weight), [(x.shape[0], weight.shape[1], *sides)])[0]

    # --- operators of exported models, without gradient rules ---------------------------------------------------

    def gather(self, table: Tensor, indices: Tensor) -> Tensor:
        """Rows of a table."""
        return self._add("Gather", (table, indices), [(*indices.shape, *table.shape[1:])], axis=0)[0]

    def floats(self, a: Tensor) -> Tensor:
        """Whole numbers as float32."""
        return self._add("Cast", (a,), [a.shape], to=TensorProto.FLOAT)[0]

    def first_rows(self, a: Tensor, like: Tensor) -> Tensor:
        """As many rows of ``a`` as ``like`` has columns."""
        count = self._add("Shape", (like,), [(1,)], start=1, end=2)[0]
        zero = self.constant(np.array([0], dtype=np.int64))
        return self._add("Slice", (a, zero, count, zero), [(like.shape[1], *a.shape[1:])])[0]

    def zero_row_first(self, a: Tensor) -> Tensor:
        """[b, n, m] → [b, n + 1, m] with a row of zeros before the others."""
        pads = self.constant(np.array([0, 1, 0, 0, 0, 0], dtype=np.int64))
        return self._add("Pad", (a, pads), [(a.shape[0], int(a.shape[1]) + 1, a.shape[2])])[0]

    # --- reverse mode -------------------------------------------------------------------------------------------

    def gradients(self, output: Tensor, seed: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
        """Append the vector-Jacobian product of ``output`` with ``seed`` and return the gradient of each leaf.

        Args:
            output: The tensor that was computed.
            seed: The gradient of the loss with respect to ``output``, of the same shape.
            wrt: The leaves to differentiate with respect to.

        Raises:
            ValueError: A leaf does not influence ``output``, or an operator on the way has no rule.
        """
        on_path: set[Tensor] = set(wrt)
        for node in self._nodes:
            if any(i in on_path for i in node.inputs):
                on_path.update(node.outputs)
        gradient: dict[Tensor, Tensor] = {output: seed}
        for node in reversed(list(self._nodes)):
            incoming = gradient.pop(node.outputs[0], None)
            if incoming is None:
                continue
            rule = _RULES.get(node.rule or node.op)
            if rule is None:
                raise ValueError(f"no gradient rule for the operator {node.op}")
            wanted = [i in on_path for i in node.inputs]
            for source, contribution in rule(self, node, incoming, wanted):
                shared = contribution is incoming  # a sum hands the same tensor to both its terms
                gradient[source] = self._accumulate(gradient.get(source), contribution, fuse=not shared)
        missing = [leaf.name for leaf in wrt if leaf not in gradient]
        if missing:
            raise ValueError(f"{', '.join(missing)} do not influence {output.name}")
        return [gradient[leaf] for leaf in wrt]

    def _accumulate(self, total: Tensor | None, term: Tensor, *, fuse: bool) -> Tensor:
        if total is None:
            return term
        last = self._nodes[-1]
        if fuse and last.op == "Gemm" and last.outputs[0] is term and len(last.inputs) == 2:
            # A product can add to its third operand while it writes: one pass over memory instead of three.
            self._nodes.pop()
            del self._producer[term]
            return self._add("Gemm", (*last.inputs, total), [term.shape], **last.attributes)[0]
        return self.add(total, term)

    # --- cutting models out -------------------------------------------------------------------------------------

    def model(self, name: str, inputs: Sequence[Tensor], outputs: dict[str, Tensor]) -> onnx.ModelProto:
        """Cut out what ``outputs`` need, down to ``inputs``.

        Inputs that nothing needs are dropped from the model, so a caller feeds exactly what the model declares.

        Raises:
            ValueError: The outputs need a leaf that is not among ``inputs``.
        """
        stop, needed, constants = set(inputs), set[_Node](), dict[Tensor, None]()
        used, weights = set[Tensor](), dict[Tensor, None]()
        stack = list(outputs.values())
        while stack:
            tensor = stack.pop()
            if tensor in stop:
                used.add(tensor)
            elif tensor in self._constants:
                constants[tensor] = None
            elif tensor in self._weights:
                weights[tensor] = None
            elif tensor not in self._producer:
                raise ValueError(f"graph {name} needs {tensor.name}, which is not among its inputs")
            elif self._producer[tensor] not in needed:
                needed.add(self._producer[tensor])
                stack.extend(self._producer[tensor].inputs)
        names: dict[Tensor, str] = {}
        copies: list[onnx.NodeProto] = []
        for alias, tensor in outputs.items():
            if tensor in names or tensor in stop or tensor not in self._producer:
                copies.append(helper.make_node("Identity", [names.get(tensor, tensor.name)], [alias]))
            else:
                names[tensor] = alias
        nodes = [
            helper.make_node(
                n.op,
                [names.get(t, t.name) for t in n.inputs],
                [names.get(t, t.name) for t in n.outputs],
                **n.attributes,
            )
            for n in self._nodes
            if n in needed
        ]
        nodes += copies
        graph = helper.make_graph(
            nodes,
            name,
            [
                helper.make_tensor_value_info(t.name, t.dtype, t.shape)
                for t in [*inputs, *weights]
                if t in used | weights.keys()
            ],
            [helper.make_tensor_value_info(alias, t.dtype, t.shape) for alias, t in outputs.items()],
            [numpy_helper.from_array(self._constants[t], t.name) for t in constants],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="fleetune")
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model)
        for tensor in weights:  # checked as inputs, since the values are not there yet
            model.graph.input.pop()
            model.graph.initializer.append(_to_be_given(tensor))
        return model


def _to_be_given(tensor: Tensor) -> onnx.TensorProto:
    """An initialiser without values: it names a file, which is not read if the values are given."""
    proto = TensorProto(name=tensor.name, dims=tensor.shape, data_type=tensor.dtype, data_location=TensorProto.EXTERNAL)
    proto.external_data.add(key="location", value="weights")
    return proto


# --- one rule for each operator: (graph, node, gradient of its output, which inputs want one) → (input, gradient) ---

_Rule = Callable[[Graph, _Node, Tensor, Sequence[bool]], Iterable[tuple[Tensor, Tensor]]]


def _gemm(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    a, b = node.inputs[:2]
    trans_a, trans_b = bool(node.attributes["transA"]), bool(node.attributes["transB"])
    alpha, beta = float(node.attributes["alpha"]), float(node.attributes["beta"])
    if wanted[0]:
        if trans_a:
            yield a, graph.gemm(b, g, trans_a=trans_b, trans_b=True, alpha=alpha)
        else:
            yield a, graph.gemm(g, b, trans_b=not trans_b, alpha=alpha)
    if wanted[1]:
        if trans_b:
            yield b, graph.gemm(g, a, trans_a=True, trans_b=trans_a, alpha=alpha)
        else:
            yield b, graph.gemm(a, g, trans_a=not trans_a, alpha=alpha)
    if len(wanted) > 2 and wanted[2]:
        of_bias = _summed_to(graph, g, node.inputs[2].shape)
        yield node.inputs[2], of_bias if beta == 1.0 else graph.mul(of_bias, beta)


def _matmul(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    a, b = node.inputs
    rank = len(g.shape)
    if any(want and source.shape[:-2] != g.shape[:-2] for source, want in zip(node.inputs, wanted, strict=True)):
        raise ValueError("a broadcast operand takes no gradient here")
    swap = [*range(rank - 2), rank - 1, rank - 2]
    if wanted[0]:
        yield a, graph.matmul(g, graph.transpose(b, swap))
    if wanted[1]:
        yield b, graph.matmul(graph.transpose(a, swap), g)


def _add(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    for source, want in zip(node.inputs, wanted, strict=True):
        if want:
            yield source, _summed_to(graph, g, source.shape)


def _sub(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    a, b = node.inputs
    if wanted[0]:
        yield a, _summed_to(graph, g, a.shape)
    if wanted[1]:
        yield b, graph.unary("Neg", _summed_to(graph, g, b.shape))


def _mul(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    for source, other, want in zip(node.inputs, reversed(node.inputs), wanted, strict=True):
        if want:
            yield source, _summed_to(graph, graph.mul(g, other), source.shape)


def _div(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    a, b = node.inputs
    share = graph.div(g, b)
    if wanted[0]:
        yield a, _summed_to(graph, share, a.shape)
    if wanted[1]:
        yield b, graph.unary("Neg", _summed_to(graph, graph.mul(share, node.outputs[0]), b.shape))


def _sqrt(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    yield node.inputs[0], graph.div(graph.mul(g, 0.5), node.outputs[0])


def _relu(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    yield node.inputs[0], graph.mul(g, graph.unary("Sign", node.outputs[0]))


def _sigmoid(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    y = node.outputs[0]
    yield node.inputs[0], graph.mul(g, graph.mul(y, graph.sub_from(1.0, y)))


def _reduce_sum(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    yield node.inputs[0], _spread(graph, node, g)


def _reduce_mean(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    x = node.inputs[0]
    for axis in graph.values(node.inputs[1]):
        size = x.shape[axis]
        g = graph.div(g, graph.size(x, axis) if isinstance(size, str) else float(size))
    yield x, _spread(graph, node, g)


def _spread(graph: Graph, node: _Node, g: Tensor) -> Tensor:
    """The gradient of a sum, at each of its terms."""
    if not node.attributes["keepdims"]:
        for axis in graph.values(node.inputs[1]):
            g = graph.unsqueeze(g, axis)
    return graph.expand(g, node.inputs[0])


def _conv(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    x, weight, bias = node.inputs
    out, channels, height, width = (int(size) for size in weight.shape)
    rows, columns = (int(size) for size in g.shape[2:])
    if wanted[0]:
        yield x, graph.conv_transpose(g, weight)
    if wanted[1]:
        # What each weight saw, [b, height · width · channels, rows · columns], times what came of it. What it saw is
        # much more than what there is, so there is never more of it than that of some pictures.
        shifts = [(i, j) for i in range(height) for j in range(width)]
        products: Tensor | None = None
        for some, theirs in zip(graph.parts(x, _PARTS), graph.parts(g, _PARTS), strict=True):
            seen = graph.concat([graph.slice(some, {2: (i, i + rows), 3: (j, j + columns)}) for i, j in shifts], 1)
            seen = graph.reshape(seen, (some.shape[0], height * width * channels, rows * columns))
            came = graph.reshape(theirs, (some.shape[0], out, rows * columns))
            found = graph.sum(graph.matmul(came, graph.transpose(seen, (0, 2, 1))), 0, keep=False)
            products = found if products is None else graph.add(products, found)
        assert products is not None
        yield weight, graph.transpose(graph.reshape(products, (out, height, width, channels)), (0, 3, 1, 2))
    if wanted[2]:
        yield bias, graph.sum(g, 0, 2, 3, keep=False)


def _max_pool(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    x = node.inputs[0]
    yield x, graph.mul(graph.double(g), graph.largest(x, node.outputs[0]))


def _gate(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    # d/du [u (1 + erf u)] = 1 + erf u + u · 2/√π exp(−u²)
    u, distribution = node.inputs
    density = graph.unary("Exp", graph.sub_from(math.log(2 / math.sqrt(math.pi)), graph.mul(u, u)))
    yield u, graph.mul(graph.add(graph.mul(density, u), distribution), g)


def _softmax(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    # g_x = p ∘ (g − Σ g ∘ p)
    p = node.outputs[0]
    yield node.inputs[0], graph.mul(graph.sub(g, graph.sum(graph.mul(g, p), -1)), p)


def _layer_norm(graph: Graph, node: _Node, g: Tensor, wanted: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    if any(wanted[1:]):
        raise ValueError("the weights of a layer normalisation are frozen here")
    x, weight, _ = node.inputs
    _, mean, inverse_deviation = node.outputs
    normal = graph.mul(graph.sub(x, mean), inverse_deviation)
    scaled = graph.mul(g, weight)
    centred = graph.sub(scaled, graph.mean(scaled, -1))
    along = graph.mul(normal, graph.mean(graph.mul(scaled, normal), -1))
    yield x, graph.mul(graph.sub(centred, along), inverse_deviation)


def _transpose(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    permutation: Sequence[int] = node.attributes["perm"]
    yield node.inputs[0], graph.transpose(g, [int(i) for i in np.argsort(permutation)])


def _reshape(graph: Graph, node: _Node, g: Tensor, _: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    yield node.inputs[0], graph.reshape(g, node.inputs[0].shape)


_RULES: dict[str, _Rule] = {
    "Add": _add,
    "Conv": _conv,
    "Div": _div,
    "Gate": _gate,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _mul,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Sqrt": _sqrt,
    "Sub": _sub,
    "Transpose": _transpose,
}


def _broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise operation on two shapes."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
    return tuple(y if x == 1 else x for x, y in zip(longer, padded, strict=True))


def _summed_to(graph: Graph, g: Tensor, shape: Shape) -> Tensor:
    """The gradient of an operand that was broadcast from ``shape``: the sum over the axes along which it repeats."""
    if g.shape == shape:
        return g
    lead = len(g.shape) - len(shape)
    if lead:
        g = graph.sum(g, *range(lead), keep=False)
    repeated = [axis for axis, size in enumerate(shape) if size == 1 and g.shape[axis] != 1]
    return graph.sum(g, *repeated) if repeated else g
