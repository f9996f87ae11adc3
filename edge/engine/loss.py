"""Softmax and cross-entropy, with their gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def softmax(logits: FloatArray) -> FloatArray:
    """Softmax over the last axis."""
    return np.exp(_log_softmax(logits))


def cross_entropy(logits: FloatArray, labels: NDArray[np.int64]) -> tuple[float, FloatArray]:
    """Summed cross-entropy of logits [n, classes], and its gradient with respect to them."""
    log_probabilities = _log_softmax(logits)
    gradient: FloatArray = np.exp(log_probabilities)
    rows = np.arange(len(labels))
    gradient[rows, labels] -= 1
    return -float(log_probabilities[rows, labels].sum()), gradient
