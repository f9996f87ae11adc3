"""What the processes of the chaos benchmark are told, and the clock that is taken from them."""

from __future__ import annotations

import time
from pathlib import Path

from fleetune.tools.bench.transfer.noop import NoOpSpec


class ChaosSpec(NoOpSpec, frozen=True):
    """What a process of the benchmark is to do.

    Attributes:
        samples: Weight of a device's updates.
        heard: File to which a device writes every acknowledgement that it hears, before it acts on it.
        given: File to which a device writes the global tensors that a round begins with.
        clock: File with the seconds by which the process's clock is wrong.
        checkpoint_rounds: Rounds after which the aggregator keeps a checkpoint.
    """

    samples: int = 1
    heard: str = ""
    given: str = ""
    clock: str = ""
    checkpoint_rounds: int = 16


def bend_clock(path: str) -> None:
    """Let the wall clock of this process be wrong; the monotonic one stays, as it would on a board.

    libfaketime cannot be used: it breaks `time.sleep`, which waits on the monotonic clock.
    """
    real, real_ns, file = time.time, time.time_ns, Path(path)

    def error_s() -> int:
        return int(file.read_text())

    time.time = lambda: real() + error_s()
    time.time_ns = lambda: real_ns() + error_s() * 10**9
