"""ONNX Runtime, as this engine uses it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fleetune.edge.protocol.errors import PackError

if TYPE_CHECKING:
    import onnxruntime


@functools.cache
def _share_arena() -> None:
    """Let all sessions of this process allocate from one arena, which grows in powers of two and is never given back.

    An arena a session would hold every graph's peak at once; the C library's allocator fragments (docs/adr/0005).
    """
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit, power_of_two, default = 0, 0, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(limit, power_of_two, default, default))


def arena_shrinks() -> onnxruntime.RunOptions:
    """Options of a run at whose end the arena gives back what is free."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def return_free_memory() -> None:
    """Give memory that the C library's allocator keeps for later back to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def open_session(
    file: Path,
    threads: int,
    *,
    initialisers: Mapping[str, NDArray[np.float32]] | None = None,
    profile: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph of a pack.

    Args:
        file: The graph.
        threads: Threads of ONNX Runtime; 0 means one for each core.
        initialisers: Values of the graph's constants that its file leaves open.
        profile: A folder for ONNX Runtime's own record of where the time goes.

    Raises:
        PackError: ONNX Runtime does not load it.
    """
    import onnxruntime  # 20 MB that an agent which waits for a round does without

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A thread that waits spinning wakes up faster; between steps it would burn what other work needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / file.stem)
    if initialisers:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in initialisers.values()]
        options.add_external_initializers(list(initialisers), values)
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PackError(
            f"{file} does not load in onnxruntime {onnxruntime.__version__}: {error}",
            "install onnxruntime >= 1.23.2, or write the pack again",
        ) from error
