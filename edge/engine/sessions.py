"""The graphs of a folder, each opened when it first runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.runtime import open_session

if TYPE_CHECKING:
    import onnxruntime

FloatArray = NDArray[np.float32]


class Sessions:
    """Opens and runs graphs.

    Args:
        folder: Where they are: a pack's folder.
        threads: Threads of ONNX Runtime; 0 means one for each core.
        profile: A folder for ONNX Runtime's own record of where the time goes; see :meth:`profiles`.
    """

    def __init__(self, folder: Path, threads: int, *, profile: Path | None = None) -> None:
        self._folder, self._threads, self._profile = folder, threads, profile
        self._open: dict[str, tuple[onnxruntime.InferenceSession, list[str], list[str]]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def session(self, stem: str) -> onnxruntime.InferenceSession:
        """The session of a graph."""
        return self._opened(stem)[0]

    def _opened(self, stem: str) -> tuple[onnxruntime.InferenceSession, list[str], list[str]]:
        """A session, and the names of what it takes and gives, which the runtime makes anew whenever it is asked."""
        if stem not in self._open:
            session = open_session(self._folder / f"{stem}.onnx", self._threads, profile=self._profile)
            names = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
            self._open[stem] = session, *names
        return self._open[stem]

    def run(
        self, stem: str, feeds: Mapping[str, FloatArray], options: onnxruntime.RunOptions | None = None
    ) -> dict[str, FloatArray]:
        """Run a graph; of ``feeds`` it takes what it needs. Returns output → value."""
        session, inputs, outputs = self._opened(stem)
        values: list[Any] = session.run(outputs, {name: feeds[name] for name in inputs}, options)
        return dict(zip(outputs, values, strict=True))

    def close(self, *prefixes: str, keep: str = "") -> None:
        """Close the graphs whose stems begin so, but for those that end on ``keep``."""
        for stem in [stem for stem in self._open if stem.startswith(prefixes)]:
            if not keep or not stem.endswith(keep):
                del self._open[stem]

    def profiles(self) -> list[Path]:
        """End the record of each graph that ran, and return its file: a JSON list of events."""
        return [Path(session.end_profiling()) for session, _, _ in self._open.values()]
