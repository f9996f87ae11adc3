"""A graph whose inputs and outputs lie in buffers that stay from step to step.

ONNX Runtime reads weights and parameters where they are and writes gradients where they are summed up, so a step copies
none of them and a training loop allocates nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

FloatArray = NDArray[np.float32]


class BoundGraph:
    """Runs a graph on buffers.

    Args:
        session: The graph's.

    Attributes:
        inputs: Names of what it takes.
        outputs: Names of what it gives.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session, self._binding = session, session.io_binding()
        self.inputs = frozenset(one.name for one in session.get_inputs())
        self.outputs = frozenset(one.name for one in session.get_outputs())
        self._buffers: dict[str, FloatArray] = {}  # kept alive: the runtime has their addresses alone

    def read(self, name: str, tensor: FloatArray) -> None:
        """From now on read an input here; an input that the graph does not have is passed over."""
        if name in self.inputs:
            self._buffers[name] = tensor = np.ascontiguousarray(tensor)
            self._binding.bind_input(name, "cpu", 0, np.float32, tensor.shape, tensor.ctypes.data)

    def write(self, name: str, tensor: FloatArray) -> None:
        """From now on write an output here."""
        self._buffers[name] = tensor
        self._binding.bind_output(name, "cpu", 0, np.float32, tensor.shape, tensor.ctypes.data)

    def run(self) -> None:
        """Run it."""
        self._session.run_with_iobinding(self._binding)
