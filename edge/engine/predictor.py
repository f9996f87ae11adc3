"""Answers from a model file: what a robot runs once its fleet has learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.dataset import Dataset, ImageDataset
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.loss import softmax
from fleetune.edge.engine.mixture import Mixture
from fleetune.edge.engine.prefix import token_mask
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import DataError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """Answers for some samples.

    Attributes:
        logits: Class scores [n, classes].
        gate: Weights [n, 2] of the global and the local expert, or of the shared and the private representation, where
            both were asked.
    """

    logits: FloatArray
    gate: FloatArray | None

    @property
    def probabilities(self) -> FloatArray:
        """Probability of each class [n, classes]."""
        return softmax(self.logits)


class Answers(ABC):
    """Answers for texts, pictures, or the samples of a data file.

    Args:
        pack: The pack that the model was trained on.
    """

    def __init__(self, pack: Pack) -> None:
        self._manifest, text = pack.manifest, pack.manifest.text
        self._tokeniser = (
            None
            if text is None
            else WordPiece(pack.path / text.vocabulary, lowercase=text.lowercase, max_length=text.max_length)
        )

    def texts(self, texts: Sequence[str]) -> Prediction:
        """Classify texts.

        Raises:
            DataError: The pack takes pictures.
        """
        if self._tokeniser is None:
            raise DataError("the pack takes pictures, not text", "use a text pack")
        ids, lengths = self._tokeniser.encode_batch(texts)
        return self.run(self.token_rows(ids), token_mask(lengths, ids.shape[1]))

    def pictures(self, pictures: NDArray[np.uint8]) -> Prediction:
        """Classify pictures, grey [n, h, w] or colour [n, h, w, 3].

        Raises:
            DataError: The pack takes text.
        """
        if self._manifest.image is None:
            raise DataError("the pack takes text, not pictures", "use a vision pack")
        patches = to_patches(pictures, self._manifest.image)
        return self.run(patches, np.ones((len(patches), 1, patches.shape[1]), dtype=np.float32), pictures)

    def samples(self, dataset: Dataset, indices: NDArray[np.int64]) -> Prediction:
        """Classify some samples of a data file."""
        rows = dataset.rows(self, indices)
        pictures = dataset.images[indices] if isinstance(dataset, ImageDataset) else None
        return self.run(rows, token_mask(dataset.lengths[indices], rows.shape[1]), pictures)

    @abstractmethod
    def run(self, sample: FloatArray, mask: FloatArray, pictures: NDArray[np.uint8] | None = None) -> Prediction:
        """Classify token rows or patches.

        Args:
            sample: Token rows or patches [b, t, e].
            mask: 1 for each real one [b, 1, t].
            pictures: What the patches were cut from.
        """

    @abstractmethod
    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [b, t] → [b, t, d]."""


class Predictor(Answers):
    """Runs an expert, or a mixture in one prefix pass and two suffix passes.

    Args:
        pack: The pack that it was trained on.
        model: Who answers, as :meth:`Model.choose <fleetune.edge.engine.model.Model.choose>` finds it.
        threads: Threads of ONNX Runtime; 0 means one for each core.
    """

    def __init__(self, pack: Pack, model: Expert | Mixture, *, threads: int = 0) -> None:
        super().__init__(pack)
        self._model = model
        experts = [model] if isinstance(model, Expert) else [model.global_, model.local]
        self._inference = Inference(pack, experts, threads=threads)

    def run(self, sample: FloatArray, mask: FloatArray, pictures: NDArray[np.uint8] | None = None) -> Prediction:
        """Classify token rows or patches [b, t, e] with their mask [b, 1, t]."""
        del pictures
        answer, model = self._inference.run(sample, mask), self._model
        if isinstance(model, Expert):
            return Prediction(model.logits(answer.features[0]), None)
        gate = model.gate.weights(answer.pooled[model.boundary])
        return Prediction(model.logits(gate, model.experts(*answer.features)), gate)

    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [b, t] → [b, t, d]."""
        return self._inference.token_rows(ids)
