"""The frozen backbone on ONNX Runtime: one block at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.engine.runtime import arena_shrinks, return_free_memory
from fleetune.edge.engine.sessions import Sessions
from fleetune.edge.pack.pack import Pack

if TYPE_CHECKING:
    import onnxruntime

FloatArray = NDArray[np.float32]


class Backbone:
    """Runs a pack's graphs.

    Hidden states are [b, t, d] and masks [b, 1, t] (1 for a real token), all float32. Only blocks that are
    :meth:`held <hold>` stay dequantised; the others share one buffer, overwritten by the next block.

    Args:
        pack: The pack.
        threads: Threads of ONNX Runtime; 0 means one for each core.
        profile: A folder for ONNX Runtime's own record of where the time goes.

    Attributes:
        sessions: The pack's graphs.
        pulse: Called before each pass through a block: somebody may have to do other things meanwhile.
    """

    def __init__(self, pack: Pack, threads: int, *, profile: Path | None = None) -> None:
        self.pack = pack
        self.blocks = pack.manifest.blocks
        self.pulse: Callable[[], None] = lambda: None
        self._weights = pack.weights()
        self.sessions = Sessions(pack.path, threads, profile=profile)
        self._held: dict[int, dict[str, FloatArray] | None] = {}
        self._scratch: tuple[int, dict[str, FloatArray]] | None = None
        self._outer = {
            name: self._weights.outer(name) for name in self._weights.outer_names if not name.endswith(".table")
        }
        self._positions = self._weights.outer("positions.table")

    def hold(self, blocks: range) -> None:
        """Keep these blocks dequantised (float32) from their next use on, and let go of all others.

        Of the graphs of a training step, only that of these blocks stays open.
        """
        self._scratch = None
        self.sessions.close("suffix_", "mixture_", keep=f"_{len(blocks)}")
        self._held = {block: self._held.get(block) for block in blocks}

    def _block_weights(self, block: int) -> dict[str, FloatArray]:
        if block in self._held:
            held = self._held[block]
            if held is None:
                held = self._held[block] = self._weights.block(block)
            return held
        if self._scratch is None or self._scratch[0] != block:
            into = self._scratch[1] if self._scratch else None
            self._scratch = (block, self._weights.block(block, into))
        return self._scratch[1]

    def _run(self, stem: str, feeds: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        self.pulse()
        return self.sessions.run(stem, feeds)

    def give_back(self) -> None:
        """Return memory that nothing uses to the system: the arena's, and the C library's where it can (glibc)."""
        if self.sessions:
            tokens = self.pack.manifest.longest
            hidden = np.zeros((1, tokens, self.pack.manifest.width), dtype=np.float32)
            feeds = {"h": hidden, "mask": np.ones((1, 1, tokens), dtype=np.float32), **self._outer}
            self.sessions.run("pool", feeds, arena_shrinks())
        return_free_memory()

    # --- around the blocks --------------------------------------------------------------------------------------

    def token_rows(self, ids: NDArray[np.int64]) -> FloatArray:
        """Look up token embeddings: ids [b, t] → [b, t, d]."""
        return self._weights.rows("tokens.table", ids)

    def embed(self, sample: FloatArray) -> FloatArray:
        """Token rows or patches [b, t, e] → hidden state before the first block."""
        positions = self._positions[: sample.shape[1]]
        return self._run("embed", {"sample": sample, "positions": positions, **self._outer})["h"]

    def pool(self, hidden: FloatArray, mask: FloatArray) -> FloatArray:
        """Last hidden state → features [b, d]."""
        return self._run("pool", {"h": hidden, "mask": mask, **self._outer})["features"]

    def pool_backward(self, hidden: FloatArray, mask: FloatArray, gradient: FloatArray) -> FloatArray:
        """Gradient of the features [b, d] → gradient of the last hidden state."""
        feeds = {"h": hidden, "mask": mask, "gradient": gradient, **self._outer}
        return self._run("pool_backward", feeds)["grad.h"]

    # --- the blocks ---------------------------------------------------------------------------------------------

    def _feeds(
        self, block: int, hidden: FloatArray, mask: FloatArray, adapters: Mapping[str, FloatArray]
    ) -> dict[str, FloatArray]:
        return {"h": hidden, "mask": mask, **self._block_weights(block), **adapters}

    def forward(
        self, block: int, hidden: FloatArray, mask: FloatArray, adapters: Mapping[str, FloatArray]
    ) -> FloatArray:
        """Hidden state after ``block``."""
        return self._run("block_forward", self._feeds(block, hidden, mask, adapters))["y"]

    def top(self, hidden: FloatArray, mask: FloatArray, adapters: Mapping[str, FloatArray]) -> FloatArray:
        """Hidden state before the last block → features [b, d]."""
        return self._run("top", self._feeds(self.blocks - 1, hidden, mask, adapters) | self._outer)["features"]

    def backward(
        self,
        block: int,
        hidden: FloatArray,
        mask: FloatArray,
        adapters: Mapping[str, FloatArray],
        gradient: FloatArray,
        *,
        bottom: bool = False,
    ) -> dict[str, FloatArray]:
        """Gradients of one block; its activations are recomputed.

        Args:
            block: The block.
            hidden: Its input.
            mask: The mask.
            adapters: Its adapters.
            gradient: Gradient of the loss with respect to its output.
            bottom: Whether the gradient of ``hidden`` is not wanted.

        Returns:
            ``grad.h`` (unless ``bottom``), ``grad.query.A`` and so on.
        """
        feeds = self._feeds(block, hidden, mask, adapters) | {"gradient": gradient}
        return self._run("block_backward_bottom" if bottom else "block_backward", feeds)

    def fused(self, depth: int, stem: str = "suffix") -> tuple[onnxruntime.InferenceSession, dict[str, FloatArray]]:
        """A graph of the top ``depth`` blocks, which must be :meth:`held <hold>`.

        Args:
            depth: How many blocks.
            stem: What they are a part of: ``suffix``, a training step, or ``mixture``, pFedMoE's.

        Returns:
            Its session, and its inputs that never change: weights, as ``0.query.weight`` and so on.
        """
        blocks = range(self.blocks - depth, self.blocks)
        assert all(block in self._held for block in blocks), "blocks that are not held share one buffer"
        weights = {
            f"{index}.{name}": tensor
            for index, block in enumerate(blocks)
            for name, tensor in self._block_weights(block).items()
        } | self._outer
        self.sessions.close("suffix_", "mixture_", keep=f"{stem}_{depth}")  # another method's, of a job before
        return self.sessions.session(f"{stem}_{depth}"), weights
