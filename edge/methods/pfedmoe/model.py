"""What a device has learned by pFedMoE, as a model file: what it goes on from, and what its owner takes home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.expert import Expert, Layout
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.model import damaged, read_model_of
from fleetune.edge.engine.parameters import Parameters
from fleetune.edge.engine.predictor import Answers, Prediction
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.methods.pfedmoe.extractor import resized
from fleetune.edge.methods.pfedmoe.gate import Gate, gate_of
from fleetune.edge.methods.pfedmoe.mixture import HEADER
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import DataError
from fleetune.edge.protocol.modelfile import LOCAL, Card, write_model_file

FloatArray = NDArray[np.float32]
_OTHERS = ("extractor.", "header.", "gate.", "running.")


@dataclass(frozen=True)
class SharedModel:
    """A model file's content.

    Attributes:
        card: What it is.
        extractor: The shared extractor, as this device has trained it on.
        expert: The private adapters; its head maps features to the representation.
        header: ``header.weight`` [m, c] and ``header.bias`` [c].
        gate: Weighs both representations.
    """

    card: Card
    extractor: Parameters
    expert: Expert
    header: Parameters
    gate: Gate

    @classmethod
    def read(cls, path: Path, pack: Pack, sessions: Sessions) -> SharedModel:
        """Read a model file.

        Args:
            path: The file.
            pack: The pack that it was trained on.
            sessions: Its graphs.

        Raises:
            ModelError: It is damaged, of another schema, of another kind, or was trained on another pack.
        """
        card, tensors = read_model_of(path, pack)
        shared = pack.manifest.extractor
        if card.kind != "pfedmoe" or card.gate is None or shared is None:
            raise damaged(path, f"it is of the kind {card.kind}, not pfedmoe")
        width = shared.representation
        header = dict(zip(HEADER, ((width, card.classes), (card.classes,)), strict=True))
        model = cls(
            card,
            Parameters(shared.shapes, what="the extractor"),
            Expert(Layout.of(pack.manifest, width)),
            Parameters(header, what="the header"),
            gate_of(card.gate, sessions, pack.manifest.width, shared.gate, width, seed=0),
        )
        parts = model.parts
        for name, tensor in tensors.items():
            if name not in parts or parts[name].shape != tensor.shape:
                raise damaged(path, f"tensor {name} of shape {tensor.shape} has no place in a file of kind pfedmoe")
            parts[name][...] = tensor
        if missing := parts.keys() - tensors.keys():
            raise damaged(path, f"tensor {min(missing)} is missing")
        return model

    @property
    def parts(self) -> Mapping[str, FloatArray]:
        """Name in the file → tensor."""
        return {
            **self.extractor.tensors,
            **{f"{LOCAL}{name}": tensor for name, tensor in self.expert.tensors.items()},
            **self.header.tensors,
            **self.gate.tensors,
        }

    def write(self, path: Path) -> None:
        """Replace ``path``, atomically."""
        write_model_file(path, self.card, self.parts)


class SharedAnswers(Answers):
    """Runs a mixture of a shared and a private representation.

    Args:
        path: The model file.
        pack: The pack that it was trained on.
        expert: ``mixture``, ``global`` for the shared representation alone, or ``local`` for the private one.
        threads: Threads of ONNX Runtime; 0 means one for each core.

    Raises:
        ModelError: The file is damaged, of another kind, or was trained on another pack.
    """

    def __init__(self, path: Path, pack: Pack, expert: str, *, threads: int = 0) -> None:
        super().__init__(pack)
        self._sessions, self._expert = Sessions(pack.path, threads), expert
        self._model = SharedModel.read(path, pack, self._sessions)
        self._inference = Inference(pack, [self._model.expert], threads=threads)

    def run(self, sample: FloatArray, mask: FloatArray, pictures: NDArray[np.uint8] | None = None) -> Prediction:
        """Classify token rows or patches [b, t, e] with their mask [b, 1, t].

        Raises:
            DataError: The pictures that patches were cut from are not given.
        """
        model = self._model
        if pictures is None and self._manifest.image is not None:
            raise DataError("the shared extractor sees pictures, not patches", "give the pictures too")
        seen = {"sample": sample, "mask": mask} if pictures is None else {"sample": resized(pictures)}
        shared = self._sessions.run("extractor", {**seen, **model.extractor.tensors})["representation"]
        answer = self._inference.run(sample, mask)
        private = model.expert.logits(answer.features[0])
        weights = model.gate.weights(answer.pooled[model.card.boundary])
        chosen = {"mixture": weights[0] * shared + weights[1] * private, "global": shared, "local": private}
        logits = chosen[self._expert] @ model.header.tensors[HEADER[0]] + model.header.tensors[HEADER[1]]
        gate = np.stack([one.mean(axis=1) for one in weights], axis=1) if self._expert == "mixture" else None
        return Prediction(logits, gate)

    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [b, t] → [b, t, d]."""
        return self._inference.token_rows(ids)
