"""How far an export's answers lie from the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fleetune.tools.export.engine import Engine, Feeds

FloatArray = NDArray[np.float32]
Run = Callable[[Feeds], dict[str, FloatArray]]


@dataclass(frozen=True)
class Comparison:
    """An export beside the engine on the same samples.

    Attributes:
        samples: Their number.
        difference: Largest absolute difference of a logit.
        relative: The same over the engine's largest absolute logit; of a mixture at least the gate's difference.
        agreement: Share of samples for which both predict the same class.
    """

    samples: int
    difference: float
    relative: float
    agreement: float


def compare(run: Run, engine: Engine, feeds: Iterable[Feeds]) -> Comparison:
    """Run both on some batches."""
    pairs = [(run(some), engine.run(some)) for some in feeds]
    found, wanted = (np.concatenate([outputs["logits"] for outputs in side]) for side in zip(*pairs, strict=True))
    difference = float(np.abs(found - wanted).max())
    gates = [np.abs(one["gate"] - other["gate"]).max() for one, other in pairs if "gate" in other]
    return Comparison(
        samples=len(wanted),
        difference=difference,
        relative=float(np.max([difference / (np.abs(wanted).max() or 1.0), *gates])),
        agreement=float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
    )


def onnx_run(file: Path) -> Run:
    """An ONNX file on ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))
