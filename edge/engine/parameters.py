"""What is trained: named tensors that are views of one flat vector, on which an optimiser works."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import DataError

FloatArray = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]


class Parameters:
    """A vector, and the tensors in it.

    Args:
        shapes: Full name → shape, in the order in which they lie in the vector.
        vector: Float32, as long as they need; a zero vector by default.
        what: Whose they are, for people.

    Attributes:
        vector: All values.
        tensors: Full name → view into the vector.
    """

    def __init__(self, shapes: Shapes, vector: FloatArray | None = None, *, what: str = "the model") -> None:
        size = sum(map(math.prod, shapes.values()))
        self.vector: FloatArray = np.zeros(size, dtype=np.float32) if vector is None else vector
        self.tensors = views(self.vector, shapes)
        self._what = what

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full name → shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def blank(self) -> Parameters:
        """Others of the same shapes, all zero."""
        return Parameters(self.shapes, what=self._what)

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite the named tensors.

        Raises:
            DataError: A name is unknown or a shape differs.
        """
        for target, array in self._fitting(tensors):
            target[...] = array

    def add(self, differences: Mapping[str, NDArray[Any]]) -> None:
        """Add to the named tensors.

        Raises:
            DataError: A name is unknown or a shape differs.
        """
        for target, array in self._fitting(differences):
            target += array

    def _fitting(self, tensors: Mapping[str, NDArray[Any]]) -> Iterator[tuple[FloatArray, NDArray[Any]]]:
        remedy = "check that both sides use the same pack and the same number of classes"
        return fitting(self._what, self.tensors, tensors, remedy)


def initial(shapes: Shapes, seed: int, *, what: str = "the model") -> Parameters:
    """Weights and biases uniform in ±1/√n, n being the inputs of a unit, as torch begins its layers.

    Linear maps are [in, out], convolutions [out, in, height, width], and a bias belongs to the weight beside it.
    """
    rng = np.random.default_rng(seed)
    found = Parameters(shapes, what=what)
    for name, tensor in found.tensors.items():
        shape = shapes[f"{name.rpartition('.')[0]}.weight"]
        bound = 1 / math.sqrt(shape[0] if len(shape) == 2 else math.prod(shape[1:]))
        tensor[...] = rng.uniform(-bound, bound, tensor.shape)
    return found


def views(vector: FloatArray, shapes: Shapes) -> dict[str, FloatArray]:
    """Full name → view into ``vector``, in the order of ``shapes``."""
    found, start = {}, 0
    for name, shape in shapes.items():
        found[name] = vector[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return found


def fitting(
    what: str, own: Mapping[str, FloatArray], tensors: Mapping[str, NDArray[Any]], remedy: str
) -> Iterator[tuple[FloatArray, NDArray[Any]]]:
    """Pairs of an own tensor and the one that is to go there.

    Args:
        what: Whose tensors they are, for people.
        own: Full name → own tensor.
        tensors: Full name → tensor from elsewhere.
        remedy: What to do where one does not fit.

    Raises:
        DataError: A name is unknown or a shape differs.
    """
    for name, array in tensors.items():
        target = own.get(name)
        if target is None or target.shape != array.shape:
            raise DataError(
                f"tensor {name} of shape {array.shape} does not fit {what}",
                remedy,
                public=f"tensor {name} does not fit {what}",
            )
        yield target, array
