"""What the benchmarks train: a backbone, its pack, and the same samples in the engine's form and in torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.numpy

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.pack.manifest import QuantisationType
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.files import write_atomic
from fleetune.tools.assets import ASSETS, fetch, write_images, write_jsonl
from fleetune.tools.assets.datasets import Split, TextRow, fashion_mnist_clients, read_rotten_tomatoes
from fleetune.tools.bench.training.spec import Spec

BATCH, DEPTH, LENGTH = 16, 2, 64
_JOINED = 5
"""Snippets in a text, so that it fills all tokens."""


@dataclass(frozen=True)
class Task:
    """One backbone and the form of its samples.

    Attributes:
        name: For people.
        backbone: Name of the asset.
        image_size: Side of the pictures; None for text of 64 tokens.
        samples: Samples of an epoch.
        classes: Classes.
        micro_batch: Samples that the engine computes at once: about 260 tokens.
        extractor: Whether the pack shares an extractor, and training is that of pFedMoE's mixture.
    """

    name: str
    backbone: Literal["minilm", "focus-vit"]
    image_size: int | None
    samples: int
    classes: int
    micro_batch: int
    extractor: bool = False


TASKS = (
    Task("MiniLM", "minilm", None, 128, 2, 4),
    Task("ViT 56 px", "focus-vit", 56, 256, 10, 16),
    Task("ViT 112 px", "focus-vit", 112, 96, 10, 4),
)


def prepare(task: Task, folder: Path, *, threads: int, say: Callable[[str], None]) -> Spec:
    """Write everything that the workers of a task read."""
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{task.name}: packs the backbone")
    pack = pack_for(task, folder / "pack", "nf4")
    samples = folder / "samples.safetensors"
    data = _text(pack, task, folder, samples) if task.image_size is None else _pictures(pack, task, samples)
    expert = Expert.initial(Layout.of(pack.manifest, task.classes), seed=0)
    write_atomic(folder / "initial.safetensors", safetensors.numpy.save(expert.tensors))
    return Spec(
        backbone=str(fetch(task.backbone)),
        pack=str(pack.path),
        data=str(data),
        samples=str(samples),
        initial=str(folder / "initial.safetensors"),
        cache=str(folder / "cache"),
        depth=DEPTH,
        rank=pack.manifest.rank,
        classes=task.classes,
        batch=BATCH,
        micro_batch=task.micro_batch,
        rate=1e-3,
        decay=0.01,
        threads=threads,
    )


def pack_for(task: Task, folder: Path, weights: QuantisationType) -> Pack:
    """Pack a task's backbone."""
    from fleetune.tools.pack.write import write_pack

    asset = ASSETS[task.backbone]
    return write_pack(
        fetch(task.backbone),
        folder,
        name=asset.name,
        licence=asset.licence,
        origin=str(asset.carrier),
        max_length=LENGTH,
        image_size=task.image_size,
        weights=weights,
        extractor=task.extractor,
    )


def _text(pack: Pack, task: Task, folder: Path, samples: Path) -> Path:
    """Reviews, several joined to one so that each fills all tokens."""
    assert pack.manifest.text is not None
    tokeniser = WordPiece(pack.path / pack.manifest.text.vocabulary, lowercase=True, max_length=LENGTH)
    count, snippets = task.samples, read_rotten_tomatoes(fetch("rotten-tomatoes"))
    kinds = [[snippet.text for snippet in snippets if snippet.label == label] for label in range(task.classes)]
    rows: list[TextRow] = []
    for start in range(0, min(map(len, kinds)) - _JOINED, _JOINED):
        for label, texts in enumerate(kinds):
            text = " ".join(texts[start : start + _JOINED])
            if len(rows) < count + 2 and tokeniser.encode_batch([text])[1][0] == LENGTH:
                split: Split = "train" if len(rows) < count else "val" if len(rows) == count else "test"
                rows.append(TextRow(text=text, label=label, split=split, group=str(start)))
    data = folder / "data.jsonl"
    write_jsonl(rows, data)
    ids, _ = tokeniser.encode_batch([row["text"] for row in rows[:count]])
    tensors = {
        "ids": ids[:, :LENGTH].astype(np.int64),
        "mask": np.ones((count, LENGTH), dtype=np.int64),
        "labels": np.array([row["label"] for row in rows[:count]], dtype=np.int64),
    }
    write_atomic(samples, safetensors.numpy.save(tensors))
    return data


def _pictures(pack: Pack, task: Task, samples: Path) -> Path:
    """Fashion-MNIST, enlarged: each pixel becomes a square."""
    spec = pack.manifest.image
    assert spec is not None
    (rows,) = fashion_mnist_clients(
        fetch("fashion-mnist"), clients=1, train=task.samples, val=1, test=1, alpha=100.0, seed=0
    )
    images = rows.images.repeat(spec.size // 28, axis=1).repeat(spec.size // 28, axis=2)
    data = samples.with_name("data.safetensors")
    write_images(data, images, rows.labels, rows.splits)
    pixels = (images[: task.samples, :, :, None] / 255 - np.array(spec.mean)) / np.array(spec.std)
    tensors = {
        "pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32),
        "labels": rows.labels[: task.samples],
    }
    write_atomic(samples, safetensors.numpy.save(tensors))
    return data
