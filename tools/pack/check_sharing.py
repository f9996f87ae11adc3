"""``fleetune pack --check`` of a pack with a shared extractor: that, the gate, and the mixture at every depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.parameters import Parameters, initial
from fleetune.edge.engine.suffix import Part, Suffix
from fleetune.edge.methods.pfedmoe.body import BackboneBody
from fleetune.edge.methods.pfedmoe.gate import gate_shapes
from fleetune.edge.methods.pfedmoe.mixture import HEADER
from fleetune.edge.methods.pfedmoe.rehearsal import OneBatch
from fleetune.edge.pack.manifest import Extractor
from fleetune.tools.pack.extractors import SHARED_CNN, DeepAveragingNetwork
from fleetune.tools.pack.mixture import ALPHAS, EXTRACTOR
from fleetune.tools.pack.torch_backbone import torch_block, torch_pool
from fleetune.tools.pack.torch_networks import TorchAveraging, TorchCnn, TorchGate, as_torch, load, parameters_of

FloatArray = NDArray[np.float32]
Comparison = tuple[str, FloatArray, FloatArray]
"""What is compared, what the pack makes of it, and what torch does."""

_CLASSES = 3


def compare_sharing(
    backbone: Backbone, model: Any, hidden: FloatArray, mask: FloatArray, rng: np.random.Generator
) -> Iterator[Comparison]:
    """Run what a pack has for pFedMoE, and the same in torch.

    Args:
        backbone: Of a pack with an extractor.
        model: The backbone in torch.
        hidden: Hidden states of some samples [b, t, d].
        mask: Their mask [b, 1, t].
        rng: Random values for all that is learned.
    """
    manifest = backbone.pack.manifest
    shared = manifest.extractor
    assert shared is not None
    extractor = initial(shared.shapes, int(rng.integers(1 << 30)))
    if manifest.text:
        sample = rng.standard_normal((*hidden.shape[:2], shared.shapes[f"{EXTRACTOR}fc1.weight"][0]), dtype=np.float32)
        data = {"sample": sample, "mask": mask}
    else:
        data = {"sample": rng.uniform(-1, 1, (len(hidden), 3, 32, 32)).astype(np.float32)}
    network = _network(shared, extractor)
    inputs = [torch.from_numpy(value) for value in data.values()]
    found = backbone.sessions.run("extractor", {**data, **extractor.tensors})["representation"]
    yield "extractor: representation", found, network(*inputs).detach().numpy()
    yield from _gate(backbone, shared, hidden.reshape(-1, hidden.shape[2]), rng)
    for depth in range(1, manifest.blocks + 1):
        for recompute in (False, True):
            suffix = Suffix(backbone, depth, recompute=recompute)
            how = "block by block" if recompute else "fused"
            for what, ours, wanted in _mixture(suffix, model, network, extractor, (hidden, mask), data, rng):
                yield f"mixture of depth {depth}, {how}: {what}", ours, wanted


def _network(shared: Extractor, extractor: Parameters) -> Any:
    """The extractor in torch."""
    if shared.kind == "cnn":
        network: Any = TorchCnn(SHARED_CNN)
    else:
        embedding, hidden = shared.shapes[f"{EXTRACTOR}fc1.weight"]
        network = TorchAveraging(DeepAveragingNetwork(embedding, hidden, shared.representation))
    load(parameters_of(network, EXTRACTOR), extractor.tensors)
    return network


def _gate(backbone: Backbone, shared: Extractor, x: FloatArray, rng: np.random.Generator) -> Iterator[Comparison]:
    shapes = gate_shapes(x.shape[1], shared.gate)
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    gate = TorchGate(x.shape[1], shared.gate)
    parameters = parameters_of(gate, "gate.")
    load(parameters, tensors)
    upstream = rng.standard_normal((len(x), 2), dtype=np.float32)
    wanted = gate(torch.from_numpy(x.copy()))
    found = backbone.sessions.run("gate_train", {**tensors, "x": x})
    yield "gate: weights", found["alpha"], wanted.detach().numpy()
    gradients = backbone.sessions.run("gate_backward", {**tensors, "x": x, "gradient": upstream})
    torched = torch.autograd.grad(wanted, list(parameters.values()), torch.from_numpy(upstream))
    yield "gate: gradients", _flat(gradients[f"grad.{name}"] for name in parameters), _flat(map(_ours, torched))


def _mixture(
    suffix: Suffix,
    model: Any,
    network: Any,
    extractor: Parameters,
    part: Part,
    data: Mapping[str, FloatArray],
    rng: np.random.Generator,
) -> Iterator[Comparison]:
    """A training step of one micro-batch."""
    pack, batch, width = suffix.backbone.pack, len(part[0]), extractor.tensors[f"{EXTRACTOR}fc2.bias"].size
    expert = Expert(Layout.of(pack.manifest, width))
    expert.vector[:] = rng.normal(0, 0.05, expert.vector.shape)
    header = initial(dict(zip(HEADER, ((width, _CLASSES), (_CLASSES,)), strict=True)), int(rng.integers(1 << 30)))
    alphas = {name: rng.uniform(0, 1, (batch, width)).astype(np.float32) for name in ALPHAS}
    labels = np.eye(_CLASSES, dtype=np.float32)[np.arange(batch) % _CLASSES]

    body = BackboneBody(OneBatch(suffix, batch, part), expert)
    others = {**extractor.tensors, **header.tensors}
    into = {name: np.zeros_like(tensor) for name, tensor in others.items()}
    ((_, states),) = body.groups(np.arange(batch))
    found = body.step(others, into, {**data, **states, **alphas, "labels": labels}, first=True)

    ours = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in expert.active(suffix.depth).items()}
    theirs = parameters_of(network, EXTRACTOR)
    heads = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in (header.tensors | alphas).items()}
    h, mask = (torch.from_numpy(value) for value in part)
    for block in suffix.blocks:
        adapters = {name: ours[f"blocks.{block}.{name}"] for name in expert.adapters(block)}
        h = torch_block(model.encoder.layer[block], h, mask, adapters, pack)
    local = torch_pool(model, h, mask, pack) @ ours["head.weight"] + ours["head.bias"]
    shared = network(*(torch.from_numpy(value) for value in data.values()))
    mixed = heads["alpha.global"] * shared + heads["alpha.local"] * local
    logits = mixed @ heads["header.weight"] + heads["header.bias"]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")

    yield "logits", found["logits"], logits.detach().numpy()
    of_weights = {name: found[f"grad.{name}"] for name in ALPHAS}
    for what, gradients, symbols, layout in (
        ("the extractor", into, theirs, _ours),
        ("the header and the weights", {**into, **of_weights}, heads, Tensor.numpy),
        ("the private model", body.gradient.tensors, ours, Tensor.numpy),
    ):
        torched = torch.autograd.grad(loss, list(symbols.values()), retain_graph=True)
        yield f"gradients of {what}", _flat(gradients[name] for name in symbols), _flat(map(layout, torched))


def _ours(gradient: Tensor) -> FloatArray:
    """A gradient of a torch module's parameter as ours are laid out."""
    found: FloatArray = as_torch(gradient.numpy()).numpy()
    return found


def _flat(tensors: Iterable[FloatArray]) -> FloatArray:
    return np.concatenate([tensor.reshape(-1) for tensor in tensors])
