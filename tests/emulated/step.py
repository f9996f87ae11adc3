"""A little of everything that an engine computes, to be compared between machines: ``python step.py PACK DATA OUT``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.cache import PrefixCache
from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import Gate
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.optimiser import Adam
from fleetune.edge.engine.prefix import token_mask
from fleetune.edge.engine.suffix import Suffix, forward_chunk
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.codec import CODECS, Codec

DEPTH, BATCH, STEPS = 2, 3, 2


def train(pack: Pack, path: Path) -> dict[str, NDArray[Any]]:
    """Name → what was computed with a pack and a device's data file."""
    data = read_dataset(path, pack)
    backbone = Backbone(pack, threads=2)
    layout = Layout.of(pack.manifest, data.classes)
    rng = np.random.default_rng(3)
    expert = Expert(layout, rng.normal(0, 0.05, layout.size).astype(np.float32))
    found: dict[str, NDArray[Any]] = {"initial": Expert.initial(layout, seed=7).vector}

    batch = data.indices("train")[:BATCH]
    labels, mask = data.labels[batch], token_mask(data.lengths[batch], int(data.lengths[batch].max()))
    embedded = data.embed(backbone, batch)
    boundary = layout.blocks - DEPTH
    ((hidden, _),) = forward_chunk(backbone, range(boundary), expert, [(embedded, mask)])
    found |= {"embedded": embedded, "prefix": hidden}
    with tempfile.TemporaryDirectory() as folder:
        prefix = PrefixCache(Path(folder), backbone, data, micro_batch=2).prefix(boundary, expert)
        found |= {"pooled": np.array(prefix.pooled), "cached": prefix.batch(batch)[0]}

    for recompute in (False, True):
        stem = "recompute" if recompute else "fused"
        suffix = Suffix(backbone, DEPTH, recompute=recompute)
        gradient = Expert(layout)
        loss, features = suffix.step(hidden, mask, labels, expert, gradient)
        (inferred,) = suffix.features([(hidden, mask)], expert)
        found |= {f"{stem}.loss": np.array([loss]), f"{stem}.features": features.copy(), f"{stem}.inferred": inferred}
        found |= {f"{stem}.{name}": tensor for name, tensor in gradient.active(DEPTH).items()}

        trained, losses = expert.copy(), []
        optimiser = Adam(layout.size, 1e-3)
        for _ in range(STEPS):
            gradient = Expert(layout)
            losses.append(suffix.step(hidden, mask, labels, trained, gradient)[0])
            optimiser.step(trained.vector, gradient.vector)
        found[f"{stem}.losses"] = np.array(losses)

    # Adam divides a gradient by its own size, so that where it is nearly nothing its last bit decides; these are not.
    moved = np.zeros(layout.size, dtype=np.float32)
    optimiser = Adam(layout.size, 1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        optimiser.step(moved, rng.uniform(0.1, 1, layout.size).astype(np.float32))
    found["adam"] = moved

    gate = Gate(layout.width, 4, seed=5)
    for tensor in gate.tensors.values():
        tensor += rng.normal(0, 0.05, tensor.shape).astype(np.float32)
    experts = rng.standard_normal((len(batch), 2, layout.classes)).astype(np.float32)
    loss, gradients = gate.gradients(found["pooled"][batch], experts, labels, None)
    found |= {"gate.loss": np.array([loss]), "gate.weights": gate.weights(found["pooled"])}
    found |= {f"gradient.{name}": tensor for name, tensor in gradients.items()}

    local = expert.copy()
    local.vector[layout.tail(DEPTH)] *= rng.uniform(0.5, 2, layout.size - layout.tail(DEPTH).start).astype(np.float32)
    answer = Inference(pack, [expert, local], threads=2).run(data.rows(backbone, batch), mask)
    found |= {"mixture.features": answer.features, "mixture.pooled": answer.pooled[boundary]}

    for codec in CODECS:
        decoded = Codec.named(codec).decode(Codec.named(codec).encode(expert.tensors), expert.layout.shapes)
        found |= {f"{codec}.{name}": tensor for name, tensor in decoded.items()}
    assert msgspec.json.decode(msgspec.json.encode(pack.manifest), type=type(pack.manifest)) == pack.manifest
    return found


if __name__ == "__main__":
    safetensors.numpy.save_file(train(Pack.open(Path(sys.argv[1])), Path(sys.argv[2])), sys.argv[3])
