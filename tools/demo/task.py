"""What the demo trains: a backbone and a data set, from assets or from the user's own folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetune.tools.assets import (
    ASSETS,
    fashion_mnist_clients,
    fetch,
    rotten_tomatoes_clients,
    write_images,
    write_jsonl,
)

TaskName = Literal["text", "images"]


@dataclass(frozen=True)
class Task:
    """One of the demo's tasks.

    Attributes:
        name: ``text`` (Rotten Tomatoes reviews, fresh or rotten) or ``images`` (Fashion-MNIST).
        local: A folder in Hugging Face format to use instead of the default backbone.
        train: Training samples of each device.
        val: Validation samples.
        test: Test samples; of films or pictures that training did not see.
        seed: Seed of the split.
    """

    name: TaskName
    local: Path | None
    train: int
    val: int
    test: int
    seed: int

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return {"text": "minilm", "images": "focus-vit"}[self.name]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return {"text": "rotten-tomatoes", "images": "fashion-mnist"}[self.name]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return {"text": 2, "images": 10}[self.name]

    @property
    def few_blocks(self) -> int:
        """Blocks of the backbone that small boards have where a fleet has several."""
        return {"text": 3, "images": 6}[self.name]

    @property
    def suffix(self) -> str:
        """Suffix of a device's data file."""
        return {"text": ".jsonl", "images": ".safetensors"}[self.name]

    def write_pack(self, out: Path, *, extractor: bool = False, blocks: int | None = None) -> None:
        """Fetch the backbone and pack it.

        Args:
            out: Where the pack goes.
            extractor: Whether the pack gets an extractor to share.
            blocks: How many of its blocks are packed, from the input; all by default.
        """
        from fleetune.tools.pack.write import write_pack
        from fleetune.tools.require import require_pack_extra

        require_pack_extra()
        asset = ASSETS[self.backbone]
        source = fetch(self.backbone, local=self.local)
        write_pack(
            source,
            out,
            name=self.local.name if self.local else asset.name,
            licence="unknown" if self.local else asset.licence,
            origin=str(self.local or asset.carrier),
            image_size=56 if self.name == "images" else None,
            blocks=blocks,
            extractor=extractor,
        )

    def write_data(self, files: list[Path]) -> None:
        """Fetch the data set and write one file for each device."""
        source = fetch(self.data)
        if self.name == "text":
            clients = rotten_tomatoes_clients(
                source, clients=len(files), train=self.train, val=self.val, test=self.test, seed=self.seed
            )
            for file, rows in zip(files, clients, strict=True):
                write_jsonl(rows, file)
            return
        pictures = fashion_mnist_clients(
            source, clients=len(files), train=self.train, val=self.val, test=self.test, alpha=0.5, seed=self.seed
        )
        for file, some in zip(files, pictures, strict=True):
            write_images(file, some.images, some.labels, some.splits)
