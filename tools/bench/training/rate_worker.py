"""How fast this machine multiplies matrices: a worker of its own, whose matrices count towards nobody's memory."""

from __future__ import annotations

import json
import os
import sys
import time


def main(threads: str) -> None:
    """Answer every request with the rate of a plain matrix product, in GFLOP/s."""
    os.environ["OPENBLAS_NUM_THREADS"] = threads  # read once, when NumPy is imported

    import numpy as np

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1024, 384), dtype=np.float32), rng.standard_normal((384, 1536), dtype=np.float32)
    out = np.empty((1024, 1536), dtype=np.float32)
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    for _ in sys.stdin:
        times = []
        for _ in range(30):
            wall = time.perf_counter()
            np.matmul(a, b, out=out)
            times.append(time.perf_counter() - wall)
        print(json.dumps({"gflops": 2 * 1024 * 384 * 1536 / float(np.median(times)) / 1e9}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
