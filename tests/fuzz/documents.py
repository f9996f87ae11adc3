"""Good inputs, from which bad ones are made: messages, tensors, a pack, a journal."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from fleetune.edge.pack.manifest import (
    FILE,
    WEIGHTS_FILE,
    Backbone,
    Extractor,
    File,
    Image,
    Manifest,
    Quantisation,
    Text,
)
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.messages import Announcement, Payload, UpdateManifest, encode
from fleetune.server.job import Job

SHAPES = {"blocks.1.query.A": (64, 2), "blocks.1.query.B": (2, 64), "head.bias": (3,), "head.weight": (64, 3)}
"""Name → shape of a job's tensors: some in four bits, some in eight."""

_rng = np.random.default_rng(7)
TENSORS = {name: _rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
DATA = Codec.named("int4+zlib").encode(TENSORS)
PAYLOAD = chunks.describe(DATA, "int4+zlib", 300)
WHOLE = chunks.describe(Codec.named("f32").encode(TENSORS), "f32", 300)

SETTINGS: dict[str, float | int | str | bool] = {
    "rank": 2, "targets": "query", "classes": 3, "seed": 0, "max_depth": 2, "depth": 1, "epochs": 1, "batch": 4,
    "optimiser": "adam", "learning_rate": 1e-3, "weight_decay": 0.01, "gate_rank": 4, "gate_learning_rate": 1e-4,
    "gate_epochs": 5, "gate_split": "train", "mix": "logits",
}  # fmt: skip

ANNOUNCEMENT = Announcement(
    fleet="lab", run="r", job="fedms", version=3, method="fedms", stage="global", round=2, rounds=11,
    backbone="cd" * 32, quantisation="nf4", settings=SETTINGS, issued=1.4e9,
    expires=1.5e9, whole=WHOLE, since="ef" * 32,
    changes=PAYLOAD,
)  # fmt: skip
UPDATE = UpdateManifest(
    fleet="lab", device="nano-1", update="r-fedms-3", run="r", job="fedms", version=3, issued=1.4e9,
    backbone="cd" * 32, samples=7,
    metrics={"loss": 0.25, "depth": 2, "stopped_early": False, "bound_by": "cpu", "test": 0.5, "cpu_s": 1.5},
    payload=PAYLOAD,
)  # fmt: skip
JOB = Job(
    id="fedms", method="fedms", backbone="cd" * 32, quantisation="nf4", shapes=SHAPES,
    rounds={"global": 4, "personal": 2}, settings=SETTINGS, codec="int4",
)  # fmt: skip

VOCABULARY = "\n".join(
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg", *(f"##{c}" for c in "abcdefg"), "film", ""]
).encode()

_PARTS = {"query.weight": (64, 64), "query.bias": (64,)}


def weights() -> bytes:
    """Quantised weights of two blocks, and the tables around them."""
    tensors: dict[str, np.ndarray] = {"positions.table": np.zeros((32, 64), np.float32)}
    for stem in ("blocks.0.query.weight", "blocks.1.query.weight", "tokens.table"):
        rows = 19 if stem == "tokens.table" else 64
        tensors[f"{stem}.codes"] = _rng.integers(0, 256, (rows, 32)).astype(np.uint8)
        tensors[f"{stem}.absmax"] = _rng.random((rows, 1)).astype(np.float32)
    tensors |= {f"blocks.{block}.query.bias": np.zeros(64, np.float32) for block in range(2)}
    data: bytes = safetensors.numpy.save(tensors)
    return data


WEIGHTS = weights()


def _file(data: bytes) -> File:
    return File(len(data), hashlib.sha256(data).hexdigest())


_LINEAR = {"fc1.weight": (64, 7), "fc1.bias": (7,), "fc2.weight": (7, 6), "fc2.bias": (6,)}
EXTRACTOR = Extractor("dan", 6, 5, {f"extractor.{name}": shape for name, shape in _LINEAR.items()}, "ab" * 32)


def manifest(*, image: bool = False, extractor: Extractor | None = None) -> Manifest:
    """Of a pack of two blocks."""
    bare = Manifest(
        schema=1, kit="0.1.0", backbone=Backbone("tiny", "bert", "cd" * 32, "none", "nowhere"), blocks=2, width=64,
        heads=2, epsilon=1e-12, rank=2, targets={"query": (64, 64)},
        quantisation=Quantisation("nf4", 64, tuple(float(n) for n in range(16))), opset=20, files={},
        text=None if image else Text("vocab.txt", lowercase=True, max_length=16),
        image=Image(28, 14, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) if image else None,
        extractor=extractor,
    )  # fmt: skip
    files = {f"{stem}.onnx": _file(stem.encode()) for stem in bare.graphs}
    files |= {WEIGHTS_FILE: _file(WEIGHTS)} | ({} if image else {"vocab.txt": _file(VOCABULARY)})
    return msgspec.structs.replace(bare, files=files)


MANIFEST = manifest()
SHARING = manifest(extractor=EXTRACTOR)


def write_pack(folder: Path, *, image: bool = False) -> Pack:
    """A pack without graphs, for whoever reads only what is beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS)
    (folder / "vocab.txt").write_bytes(VOCABULARY)
    found = manifest(image=image)
    (folder / FILE).write_bytes(encode(found))
    return Pack(folder, found, "12" * 32)


def replaced(payload: Payload, data: bytes) -> Payload:
    """The same announcement for other bytes."""
    return msgspec.structs.replace(payload, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
