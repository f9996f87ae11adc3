"""Answers from a model file: what a robot runs once its fleet has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.inference import Inference
from fleetune.edge.engine.loss import softmax
from fleetune.edge.engine.model import Model
from fleetune.edge.engine.prefix import token_mask
from fleetune.edge.pack.pack import Pack
from fleetune.edge.pack.patches import to_patches
from fleetune.edge.pack.wordpiece import WordPiece
from fleetune.edge.protocol.errors import DataError, ModelError

FloatArray = NDArray[np.float32]
ExpertName = Literal["mixture", "global", "local"]


@dataclass(frozen=True)
class Prediction:
    """Answers for some samples.

    Attributes:
        logits: Class scores [n, classes].
        gate: Weights [n, 2] of the global and the local expert, where both were asked.
    """

    logits: FloatArray
    gate: FloatArray | None

    @property
    def probabilities(self) -> FloatArray:
        """Probability of each class [n, classes]."""
        return softmax(self.logits)


class Predictor:
    """Runs the experts of a model file; a mixture takes one prefix pass and two suffix passes.

    Args:
        pack: The pack that the model was trained on.
        model: The model.
        expert: Who answers; by default the mixture where the file holds one, else the global expert.
        threads: Threads of ONNX Runtime; 0 means one for each core.

    Attributes:
        expert: Who answers.

    Raises:
        ModelError: The file holds no such expert.
    """

    def __init__(self, pack: Pack, model: Model, *, expert: ExpertName | None = None, threads: int = 0) -> None:
        expert = expert or ("global" if model.mixture is None else "mixture")
        self.expert: ExpertName = expert
        self._manifest, self._mixture = pack.manifest, model.mixture if expert == "mixture" else None
        if expert != "global" and model.local is None:
            raise ModelError(
                f"the model of the job {model.card.job} holds the global expert alone, not the {expert}",
                "name a device's model.safetensors, or --expert global",
            )
        self._head = model.local if expert == "local" and model.local is not None else model.global_
        experts = [self._head] if self._mixture is None else [self._mixture.global_, self._mixture.local]
        self._inference = Inference(pack, experts, threads=threads)
        text = pack.manifest.text
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
        return self._predict(self._inference.token_rows(ids), token_mask(lengths, ids.shape[1]))

    def pictures(self, pictures: NDArray[np.uint8]) -> Prediction:
        """Classify pictures, grey [n, h, w] or colour [n, h, w, 3].

        Raises:
            DataError: The pack takes text.
        """
        if self._manifest.image is None:
            raise DataError("the pack takes text, not pictures", "use a vision pack")
        patches = to_patches(pictures, self._manifest.image)
        return self._predict(patches, np.ones((len(patches), 1, patches.shape[1]), dtype=np.float32))

    def samples(self, dataset: Dataset, indices: NDArray[np.int64]) -> Prediction:
        """Classify some samples of a data file."""
        rows = dataset.rows(self._inference, indices)
        return self._predict(rows, token_mask(dataset.lengths[indices], rows.shape[1]))

    def _predict(self, sample: FloatArray, mask: FloatArray) -> Prediction:
        answer = self._inference.run(sample, mask)
        if self._mixture is None:
            return Prediction(self._head.logits(answer.features[0]), None)
        gate = self._mixture.gate.weights(answer.pooled[self._mixture.boundary])
        return Prediction(self._mixture.logits(gate, self._mixture.experts(*answer.features)), gate)
