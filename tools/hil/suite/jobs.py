"""Runs that tests have boards take part in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import safetensors.numpy
from numpy.typing import NDArray

from fleetune.edge.protocol.modelfile import FILE as MODEL_FILE
from fleetune.tools.rig import Job

Rounds = Callable[[float], tuple[str, ...]]
"""Options of a run whose rounds take so many seconds, more or less."""

LONG_S = 20.0
"""Seconds of a round that is long enough for something to happen in it."""

DONE_WITHIN_S = 600.0


def model(job: Job) -> dict[str, NDArray[Any]]:
    """The tensors that a run of FedMS has trained so far."""
    tensors: dict[str, NDArray[Any]] = safetensors.numpy.load_file(job.state / "fedms" / MODEL_FILE)
    return tensors
