"""What a run trained, with the pack's shapes: the global expert, and on a device the local expert and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.gate import ADAPTER, HEAD, Gate
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.pack.manifest import WEIGHTS_FILE
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError, DataError, ModelError
from fleetune.edge.protocol.modelfile import (
    GATE,
    GLOBAL,
    LOCAL,
    REMEDY,
    Card,
    GateKind,
    Mix,
    read_model_file,
    write_model_file,
)

ExpertName = Literal["mixture", "global", "local"]
Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Model:
    """A model file's content.

    Attributes:
        card: What it is.
        global_: The global expert.
        local: The local expert of a device.
        gate: The gate of a device; present where a local expert is.
    """

    card: Card
    global_: Expert
    local: Expert | None = None
    gate: Gate | None = None

    @classmethod
    def read(cls, path: Path, pack: Pack) -> Model:
        """Read a model file.

        Args:
            path: The file.
            pack: The pack that it was trained on.

        Raises:
            ModelError: It is damaged, of another schema, or was trained on another pack.
        """
        card, tensors = read_model_of(path, pack)
        if card.kind == "pfedmoe":
            raise ModelError(
                f"{path} holds a mixture with a shared extractor (pFedMoE), no global expert",
                "answer with it by `fleetune predict`; it has no export",
            )
        parts = (GLOBAL, LOCAL, GATE) if card.kind == "mixture" else (GLOBAL,)
        for name in tensors:
            if not name.startswith(parts):
                raise damaged(path, f"tensor {name} has no place in a file of kind {card.kind}")
        try:
            global_ = _expert(path, card, tensors, GLOBAL, pack)
            if card.kind == "global":
                return cls(card, global_)
            return cls(card, global_, _expert(path, card, tensors, LOCAL, pack), _gate(path, tensors, pack))
        except DataError as error:
            raise damaged(path, error.what) from error

    def write(self, path: Path) -> None:
        """Replace ``path``, atomically."""
        tensors = {f"{GLOBAL}{name}": tensor for name, tensor in self.global_.tensors.items()}
        if self.local is not None and self.gate is not None:
            tensors |= {f"{LOCAL}{name}": tensor for name, tensor in self.local.tensors.items()}
            tensors |= self.gate.tensors
        write_model_file(path, self.card, tensors)

    def choose(self, name: ExpertName | None) -> tuple[ExpertName, Expert | Mixture]:
        """Who answers: what was asked for, or else the mixture, or else the global expert.

        Raises:
            ConfigError: The file does not hold it.
        """
        name = name or ("global" if self.mixture is None else "mixture")
        found = {"mixture": self.mixture, "global": self.global_, "local": self.local}[name]
        if found is None:
            raise ConfigError(
                f"--expert: the model of the job {self.card.job} holds the global expert alone, no {name}",
                "use --expert global, or the model file of a device",
            )
        return name, found

    @property
    def mixture(self) -> Mixture | None:
        """Both experts and the gate, if they are here."""
        if self.local is None or self.gate is None:
            return None
        return Mixture(self.global_, self.local, self.gate, self.card.boundary, self.card.mix)


def card_for(
    pack: Pack,
    *,
    kind: Literal["global", "mixture", "pfedmoe"],
    job: str,
    run: str,
    classes: int,
    max_depth: int,
    mix: Mix,
    gate: GateKind | None = None,
) -> Card:
    """The card of what a job trains on a pack; ``max_depth`` is the deepest that any device of the job may train."""
    manifest = pack.manifest
    return Card(
        kit=version("fleetune"),
        kind=kind,
        job=job,
        run=run,
        pack=pack.sha256,
        weights=manifest.files[WEIGHTS_FILE].sha256,
        backbone=manifest.backbone.sha256,
        blocks=manifest.blocks,
        rank=manifest.rank,
        targets=tuple(manifest.targets),
        classes=classes,
        boundary=manifest.blocks - max_depth,
        mix=mix,
        extractor=None if gate is None or manifest.extractor is None else manifest.extractor.sha256,
        gate=gate,
    )


def read_model_of(path: Path, pack: Pack) -> tuple[Card, Mapping[str, NDArray[np.float32]]]:
    """Read a model file and see that it belongs to a pack.

    Raises:
        ModelError: It is damaged, of another schema, or was trained on another pack.
    """
    card, tensors = read_model_file(path)
    _check_pack(path, card, pack)
    if card.boundary >= card.blocks:
        raise damaged(path, f"field boundary: {card.boundary} is not below the {card.blocks} blocks")
    return card, tensors


def _check_pack(path: Path, card: Card, pack: Pack) -> None:
    manifest = pack.manifest
    shared = None if manifest.extractor is None else manifest.extractor.sha256
    for what, theirs, own in (
        ("the backbone", card.backbone, manifest.backbone.sha256),
        ("weights", card.weights, manifest.files[WEIGHTS_FILE].sha256),
        ("blocks:", card.blocks, manifest.blocks),
        ("adapters of rank", card.rank, manifest.rank),
        ("adapters on", ",".join(card.targets), ",".join(manifest.targets)),
        *([("the extractor", card.extractor, shared)] if card.extractor is not None else []),
    ):
        if theirs != own:
            raise ModelError(
                f"{path} was trained on {what} {theirs}, the pack {pack.path} has {own}",
                f"give the pack that it was trained on, SHA-256 {card.pack}, or one that was made alike",
            )


def damaged(path: Path, why: str) -> ModelError:
    """The error of a model file that holds what it cannot."""
    return ModelError(f"{path} is damaged: {why}", REMEDY)


def _expert(path: Path, card: Card, tensors: Tensors, part: str, pack: Pack) -> Expert:
    """One expert; adapters that are absent stay zero, which changes nothing."""
    own = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
    needed = {"head.weight", "head.bias"}
    needed |= {f"{name[:-1]}{side}" for name in own if name.startswith("blocks.") for side in "AB"}
    if missing := needed - own.keys():
        raise damaged(path, f"tensor {part}{min(missing)} is missing")
    if own["head.bias"].shape != (card.classes,):  # before anything of that many classes is made
        raise damaged(path, f"tensor {part}head.bias does not have {card.classes} classes")
    expert = Expert(Layout.of(pack.manifest, card.classes))
    expert.load(own)
    return expert


def _gate(path: Path, tensors: Tensors, pack: Pack) -> Gate:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(GATE)}
    if missing := {*ADAPTER, *HEAD} - own.keys():
        raise damaged(path, f"tensor {min(missing)} is missing")
    a = own["gate.A"]
    if a.ndim != 2 or a.shape[0] != pack.manifest.width:
        raise damaged(path, f"tensor gate.A has the shape {a.shape}")
    gate = Gate(pack.manifest.width, a.shape[1], seed=0)
    gate.load(own)
    return gate
