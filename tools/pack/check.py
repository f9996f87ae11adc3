"""``fleetune pack --check``: holds a pack against the torch reference, number by number.

The reference is the Hugging Face model itself, with the pack's dequantised weights loaded strictly and a LoRA of
random values on the pack's targets, differentiated by torch autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.suffix import Suffix
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.protocol.errors import PackError
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.pack.checkpoint import WEIGHTS, Checkpoint, first_blocks, is_matrix, read_checkpoint
from fleetune.tools.pack.quantise import BLOCK_SIZE, quantise
from fleetune.tools.pack.torch_backbone import torch_backbone, torch_block, torch_pool

FloatArray = NDArray[np.float32]

TOLERANCE = 1e-5
"""Largest error of a gradient, relative to the largest entry of the reference."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: What was compared.
        error: Largest absolute difference over the largest absolute reference value.
    """

    what: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is within :data:`TOLERANCE`."""
        return self.error <= TOLERANCE


def check_pack(pack: Pack, source: Path, *, seed: int = 0) -> list[Check]:
    """Compare a pack's graphs with torch on random input, a part of which is padding.

    Args:
        pack: The pack.
        source: The Hugging Face folder that it was made from.
        seed: Seed of the random input.

    Raises:
        PackError: The pack was made from another backbone.
    """
    import torch

    rng = np.random.default_rng(seed)
    image_size = pack.manifest.image.size if pack.manifest.image else None
    weights = source / WEIGHTS
    if weights.is_file():
        whole, found = file_sha256(weights), pack.manifest.backbone.sha256
        if found not in (whole, first_blocks(whole, pack.manifest.blocks)):
            raise PackError(
                f"{pack.path} is a pack of {pack.manifest.backbone.id}, made from other weights than {source} holds",
                "name the backbone that the pack was made from",
            )
    checkpoint = read_checkpoint(source, image_size=image_size, blocks=pack.manifest.blocks)
    backbone = Backbone(pack, threads=0)
    model = torch_backbone(pack, source)
    layers = model.encoder.layer
    expert = Expert.initial(Layout.of(pack.manifest, classes=2), seed)
    expert.vector[:] = rng.normal(0, 0.05, expert.vector.shape)
    batch, length, width = 3, 17, pack.manifest.width
    if pack.manifest.image:
        length = (pack.manifest.image.size // pack.manifest.image.patch) ** 2 + 1
    hidden = rng.standard_normal((batch, length, width), dtype=np.float32)
    upstream = rng.standard_normal((batch, length, width), dtype=np.float32)
    mask = np.ones((batch, 1, length), dtype=np.float32)
    if pack.manifest.text:
        mask[0, 0, length // 2 :] = 0
        mask[1, 0, length - 1 :] = 0
    checks = _weight_checks(pack, checkpoint)
    checks.append(Check("embedding", _embedding_error(pack, backbone, model, rng)))
    for index in (0, pack.manifest.blocks - 1):
        adapters = expert.adapters(index)
        symbols = {name: torch.tensor(array, requires_grad=True) for name, array in adapters.items()}
        h = torch.tensor(hidden, requires_grad=True)
        y = torch_block(layers[index], h, torch.tensor(mask), symbols, pack)
        reference = torch.autograd.grad(y, [h, *symbols.values()], torch.tensor(upstream))
        names = ["grad.h", *(f"grad.{name}" for name in symbols)]
        wanted = {name: grad.numpy() for name, grad in zip(names, reference, strict=True)}
        out = backbone.forward(index, hidden, mask, adapters)
        checks.append(Check(f"block {index}: forward", _error(out, y.detach().numpy())))
        got = backbone.backward(index, hidden, mask, adapters, upstream)
        checks += [Check(f"block {index}: {name}", _error(got[name], wanted[name])) for name in names]
        if index == pack.manifest.blocks - 1:
            wanted_top = torch_pool(model, y, torch.tensor(mask), pack).detach().numpy()
            checks.append(Check("last block and features", _error(backbone.top(hidden, mask, adapters), wanted_top)))
    for depth in range(1, pack.manifest.blocks + 1):
        error = _step_error(Suffix(backbone, depth, recompute=False), model, expert, hidden, mask)
        checks.append(Check(f"fused step of depth {depth}: gradients", error))
    if pack.manifest.text:
        sample = backbone.token_rows(rng.integers(0, model.config.vocab_size, (batch, length)))
    else:
        sample = _patches(pack, rng)
    for depth in range(pack.manifest.blocks + 1):
        error = _inference_error(backbone, model, expert, depth, sample, mask)
        checks.append(Check(f"inference at depth {depth}: features", error))
    features = backbone.pool(hidden, mask)
    h = torch.tensor(hidden, requires_grad=True)
    z = torch_pool(model, h, torch.tensor(mask), pack)
    seed_z = rng.standard_normal(features.shape, dtype=np.float32)
    (grad,) = torch.autograd.grad(z, h, torch.tensor(seed_z))
    checks.append(Check("features", _error(features, z.detach().numpy())))
    checks.append(Check("features: grad.h", _error(backbone.pool_backward(hidden, mask, seed_z), grad.numpy())))
    if pack.manifest.extractor:
        from fleetune.tools.pack.check_sharing import compare_sharing

        checks += [Check(what, _error(*both)) for what, *both in compare_sharing(backbone, model, hidden, mask, rng)]
    return checks


def _step_error(suffix: Suffix, model: Any, expert: Expert, hidden: FloatArray, mask: FloatArray) -> float:
    """Error of the whole gradient of a fused training step against torch autograd."""
    import torch

    pack, found = suffix.backbone.pack, Expert(expert.layout)
    labels = np.arange(len(hidden)) % expert.layout.classes
    suffix.step(hidden, mask, labels, expert, found)
    symbols = {name: torch.tensor(t, requires_grad=True) for name, t in expert.active(suffix.depth).items()}
    h = torch.tensor(hidden)
    for block in suffix.blocks:
        adapters = {name: symbols[f"blocks.{block}.{name}"] for name in expert.adapters(block)}
        h = torch_block(model.encoder.layer[block], h, torch.tensor(mask), adapters, pack)
    logits = torch_pool(model, h, torch.tensor(mask), pack) @ symbols["head.weight"] + symbols["head.bias"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
    wanted = torch.autograd.grad(loss, list(symbols.values()))
    got = np.concatenate([found.tensors[name].reshape(-1) for name in symbols])
    return _error(got, np.concatenate([grad.numpy().reshape(-1) for grad in wanted]))


def _inference_error(
    backbone: Backbone, model: Any, expert: Expert, depth: int, sample: FloatArray, mask: FloatArray
) -> float:
    """Error of the features of one expert, or of two that differ in the top ``depth`` blocks."""
    import torch

    experts, pack = [expert], backbone.pack
    if depth:
        experts.append(expert.copy())
        tail = expert.layout.tail(depth)
        experts[1].vector[tail] = expert.vector[tail][::-1]
    start, wanted = torch.tensor(backbone.embed(sample)), []
    for some in experts:
        h = start
        for block in range(pack.manifest.blocks):
            adapters = {name: torch.tensor(tensor) for name, tensor in some.adapters(block).items()}
            h = torch_block(model.encoder.layer[block], h, torch.tensor(mask), adapters, pack)
        wanted.append(torch_pool(model, h, torch.tensor(mask), pack).detach().numpy())
    return _error(Inference(pack, experts, threads=0).run(sample, mask).features, np.stack(wanted))


def _patches(pack: Pack, rng: np.random.Generator) -> FloatArray:
    """Random pictures, as the backbone takes them."""
    spec = pack.manifest.image
    assert spec is not None
    return to_patches(rng.integers(0, 256, (3, spec.size, spec.size, 3), dtype=np.uint8), spec)


def _weight_checks(pack: Pack, checkpoint: Checkpoint) -> list[Check]:
    """The pack's weights against the backbone's, quantised anew."""
    weights = pack.weights()
    checks = []
    for index, block in enumerate(checkpoint.blocks):
        packed = weights.block(index)
        errors = [
            _error(packed[name], _stored(array, pack) if is_matrix(name) else array) for name, array in block.items()
        ]
        checks.append(Check(f"block {index}: weights", max(errors)))
    for name, array in checkpoint.outer.items():
        if name == "tokens.table":
            found, wanted = weights.rows(name, np.arange(len(array))), _stored(array, pack)
        else:
            found, wanted = weights.outer(name), array
        checks.append(Check(name, _error(found, wanted)))
    return checks


def _stored(matrix: FloatArray, pack: Pack) -> FloatArray:
    """What a pack makes of a matrix."""
    how = pack.manifest.quantisation
    stored = quantise("it", matrix, how.type)
    if "it" in stored:
        return matrix
    codes, scales = stored["it.codes"], stored["it.absmax"]
    if how.type == "nf4":
        values = np.asarray(how.code, dtype=np.float32)[np.stack([codes >> 4, codes & 15], axis=2)]
    else:
        values = codes.astype(np.float32) / np.float32(127)
    return (values.reshape(len(matrix), -1, BLOCK_SIZE) * scales[..., None]).reshape(matrix.shape)


def _error(found: FloatArray, reference: FloatArray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def _embedding_error(pack: Pack, backbone: Backbone, model: Any, rng: np.random.Generator) -> float:
    import torch

    if pack.manifest.text:
        ids = rng.integers(0, model.config.vocab_size, (2, 11))
        found = backbone.embed(backbone.token_rows(ids))
        reference = model.embeddings(input_ids=torch.from_numpy(ids))
    else:
        spec = pack.manifest.image
        assert spec is not None
        pictures = rng.integers(0, 256, (2, spec.size, spec.size, 3), dtype=np.uint8)
        found = backbone.embed(to_patches(pictures, spec))
        mean, deviation = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
        normal = (pictures.astype(np.float32) / 255 - mean) / deviation
        reference = model.embeddings(torch.from_numpy(normal.transpose(0, 3, 1, 2).astype(np.float32)))
    return _error(found, reference.detach().numpy())
