"""One plan's training steps, measured in a process of its own: ``python -m fleetune.edge.resources.trial [LIMIT]``.

The request on its standard input is JSON. The process imports what an agent imports, so that its peak is an agent's
peak, runs real forward and backward passes on random samples, and prints one JSON object.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, BudgetError
from fleetune.edge.resources.confine import Killed, enter, run_confined
from fleetune.edge.resources.ending import in_words

_CHUNK_BLOCKS = 2
_CHUNKS = 3
_MODULE = "fleetune.edge.resources.trial"


class Request(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        pack: The pack's folder.
        depth: Active blocks.
        micro_batch: Samples a step.
        length: Tokens of the longest sample.
        recompute: Whether activations are recomputed.
        threads: Threads of ONNX Runtime.
        steps: How many steps are timed, after some that are not.
    """

    pack: str
    depth: int
    micro_batch: int
    length: int
    recompute: bool
    threads: int
    steps: int = 4


_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Amount = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured.

    Attributes:
        depth: Active blocks.
        micro_batch: Samples a step.
        length: Tokens of a sample when time was measured, and of the longest when memory was.
        recompute: Whether activations were recomputed.
        base_mib: Peak of the process before the first step: interpreter and libraries.
        frozen_mib: Its peak after a chunk of samples has gone through frozen blocks, in MiB.
        peak_mib: Its peak after the steps.
        step_s: Seconds of one forward and backward pass of a micro-batch (median).
        step_cpu_s: Its CPU seconds (median).
        forward_s: Seconds of one block's forward pass over a chunk of samples, in micro-batches.
        forward_cpu_s: CPU seconds of the same.
        watts: Power during the steps; None without a sensor.
    """

    depth: _Count
    micro_batch: _Count
    length: _Count
    recompute: bool
    base_mib: _Amount
    frozen_mib: _Amount
    peak_mib: _Amount
    step_s: _Amount
    step_cpu_s: _Amount
    forward_s: _Amount
    forward_cpu_s: _Amount
    watts: _Amount | None = None


def run_trial(request: Request, *, limit_mib: float | None = None, timeout: float = 300.0) -> Trial | Killed:
    """Measure in a child process.

    Args:
        request: What to measure.
        limit_mib: Memory that the child may take.
        timeout: Seconds.

    Raises:
        BudgetError: The child failed for another reason than its limit.
    """
    try:
        done = run_confined(_MODULE, msgspec.json.encode(request), limit_mib=limit_mib, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BudgetError(
            f"a training step at depth {request.depth} takes longer than {timeout:.0f} s", "use a smaller backbone"
        ) from error
    if isinstance(done, Killed):
        return done
    if wrong := in_words(done):
        raise BudgetError(
            f"a trial step at depth {request.depth}, micro-batch {request.micro_batch} failed: {wrong}",
            "give the device more memory, or use a smaller backbone",
        )
    try:
        return msgspec.json.decode(done.stdout, type=Trial)
    except UNDECODABLE as error:
        raise BudgetError(
            f"a trial step at depth {request.depth} says {done.stdout[:80]!r}", "see what prints on standard output"
        ) from error


def _measure(request: Request) -> Trial:
    import numpy as np

    importlib.import_module("fleetune.edge.agent.agent")  # by name: it knows of trials; it counts towards the peak
    from fleetune.edge.engine.backbone import Backbone
    from fleetune.edge.engine.expert import Expert, Layout
    from fleetune.edge.engine.optimiser import Adam
    from fleetune.edge.engine.prefix import CHUNK
    from fleetune.edge.engine.suffix import Part, Suffix, forward_chunk
    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.resources.probes.power import EnergyMeter
    from fleetune.edge.resources.probes.tree import Tree
    from fleetune.edge.resources.process import Stopwatch, peak_mib

    pack = Pack.open(Path(request.pack), verify=False)
    backbone = Backbone(pack, request.threads)
    layout = Layout.of(pack.manifest, classes=2)
    expert, gradient = Expert.initial(layout, seed=0), Expert(layout)
    rng = np.random.default_rng(0)
    optimiser = Adam(layout.size, 1e-4)
    labels = np.zeros(request.micro_batch, dtype=np.int64)
    if pack.manifest.extractor is not None:  # packed to be shared: a step is one of the whole mixture
        rehearsal = importlib.import_module("fleetune.edge.methods.pfedmoe.rehearsal")
    base = peak_mib()

    def part(length: int) -> Part:
        hidden = rng.standard_normal((request.micro_batch, length, pack.manifest.width), dtype=np.float32)
        return hidden, np.ones((request.micro_batch, 1, length), dtype=np.float32)

    def adapt(of: Part) -> None:
        suffix.step(*of, labels, expert, gradient)
        optimiser.step(expert.vector, gradient.vector)

    # What an agent does before and between steps: a chunk of samples, embedded and sent through the frozen blocks, and
    # steps of other lengths that samples have. The allocator keeps some of that memory, so it belongs to the peak.
    chunk = max(1, CHUNK // request.micro_batch)
    shape = (request.micro_batch, request.length, pack.manifest.sample_width)
    parts = [part(request.length) for _ in range(chunk)]
    parts = [(backbone.embed(rng.standard_normal(shape, dtype=np.float32)), mask) for _, mask in parts]
    forward_chunk(backbone, range(1), expert, parts[:1])  # the first one makes ready, and takes longer
    times = []
    for _ in range(_CHUNKS):
        watch = Stopwatch()
        forward_chunk(backbone, range(_CHUNK_BLOCKS), expert, parts)
        times.append(watch.read())
    forward_s, forward_cpu_s = (np.median(times, axis=0) / _CHUNK_BLOCKS).tolist()
    del parts
    frozen_mib = peak_mib()
    backbone.give_back()
    suffix = Suffix(backbone, request.depth, recompute=request.recompute)
    step = adapt if pack.manifest.extractor is None else rehearsal.step_of(suffix, request.micro_batch)
    eighths = (3, 4, 5, 6, 7, 8) if pack.manifest.text is not None else (8,)
    for length in [max(1, request.length * some // 8) for some in eighths]:
        step(part(length))
    usual, times = part(request.length), []
    with EnergyMeter(Tree()) as meter:
        whole = Stopwatch()
        for _ in range(request.steps):
            watch = Stopwatch()
            step(usual)
            times.append(watch.read())
        joules, seconds = meter.joules(), whole.read()[0]
    step_s, step_cpu_s = np.median(times, axis=0).tolist()
    return Trial(
        depth=request.depth,
        micro_batch=request.micro_batch,
        length=request.length,
        recompute=request.recompute,
        base_mib=base,
        frozen_mib=frozen_mib,
        peak_mib=max(frozen_mib, peak_mib()),  # the kernel counts a little behind
        step_s=step_s,
        step_cpu_s=step_cpu_s,
        forward_s=forward_s,
        forward_cpu_s=forward_cpu_s,
        watts=joules / seconds if joules else None,
    )


if __name__ == "__main__":
    enter(sys.argv[1:])
    sys.stdout.buffer.write(msgspec.json.encode(_measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Request))))
