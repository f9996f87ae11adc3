"""The long run: many inputs for each parser, in a process whose memory is limited.

``PYTHONPATH=tests python -m fuzz`` reads 100,000 inputs by each parser; ``--target``, ``--inputs`` and ``--seed``
choose. A failure is printed with the entropy that makes its input: ``--again HEX`` reads that one once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from fuzz.target import MIB, Sandbox, Target, check, is_measured
from fuzz.targets.every import TARGETS

AT_ONCE = 25_000
"""Inputs that one process reads: measuring memory leaves some taken, a few KiB an input."""

ROOM = 128 * MIB
"""Bytes that a process may grow by, beside what one input may take: libraries load late, and caches fill."""


def main() -> int:
    """Read inputs by all targets, each in a process of its own; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, metavar="NAME", help="one of --list; repeatable")
    parser.add_argument(
        "--inputs", type=int, default=100_000, metavar="N", help="for each target (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9, metavar="N", help="default: the clock's")
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--again", metavar="HEX", help="read one input of --target again")
    parser.add_argument("--alone", action="store_true", help="in this process, and print JSON")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    if args.list:
        print("\n".join(names))
        return 0
    if args.again is not None:
        with Sandbox() as sandbox:
            print(check(TARGETS[names[0]], bytes.fromhex(args.again), sandbox) or "taken")
        return 0
    if args.alone:
        print(json.dumps(_read(TARGETS[names[0]], args.inputs, args.seed)))
        return 0
    return max(_report(name, args.inputs, args.seed) for name in names)


def _report(name: str, inputs: int, seed: int) -> int:
    """Read inputs in several processes, one after the other; 1 if one failed."""
    counts, grew, failed, started = Counter[str](), 0, 0, time.monotonic()
    for number, first in enumerate(range(0, inputs, AT_ONCE)):
        some = ["--inputs", str(min(AT_ONCE, inputs - first)), "--seed", str(seed + number)]
        command = [sys.executable, "-m", "fuzz", "--alone", "--target", name, *some]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: the process ended with {done.returncode}: {done.stderr[-2000:]}", flush=True)
            return 1
        found = json.loads(done.stdout)
        counts.update(found["counts"])
        grew = max(grew, found["grew_mib"])
        for failure in found["failures"]:
            failed = 1
            print(f"  {failure['entropy']}\n{failure['trace']}", flush=True)
    listed = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    seconds = time.monotonic() - started
    print(f"{name}: {inputs} inputs, seed {seed}, {seconds:.0f} s, grew by {grew} MiB: {listed}", flush=True)
    return failed


def _read(target: Target, inputs: int, seed: int) -> dict[str, object]:
    """Read inputs, and tell how they fared."""
    logging.disable()
    warnings.simplefilter("ignore")
    rng, counts, failures = random.Random(seed), Counter[str](), dict[str, dict[str, str]]()
    with Sandbox() as sandbox:
        check(target, b"", sandbox)
        before = _size()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (before + ROOM + target.memory, most))
        for _ in range(inputs):
            entropy = rng.randbytes(rng.randrange(64))
            try:
                counts[check(target, entropy, sandbox, measure=is_measured(entropy)) or "taken"] += 1
            except Exception as error:  # noqa: BLE001 - whatever nobody declared is what is looked for
                counts["failed"] += 1
                sandbox.strays.clear()
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} {place.filename}:{place.lineno}"
                failures.setdefault(kind, {"entropy": entropy.hex(), "trace": traceback.format_exc()})
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return {"counts": counts, "failures": list(failures.values()), "grew_mib": (_size() - before) // MIB}


def _size() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
