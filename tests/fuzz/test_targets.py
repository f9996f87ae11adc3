"""Whatever the bytes, a parser refuses by its declared errors, within its memory, and writes into its own folder.

Each parser gets 2,000 inputs, always the same: a tenth from hypothesis, which also makes a failing one as small as it
can, the others from a generator, which takes less time. `FUZZ_INPUTS=20000 FUZZ_FRESH=1 pytest tests/fuzz` gives it
more, and others each time. The long run is `PYTHONPATH=tests python -m fuzz`.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fuzz.target import Sandbox, Target, check, is_measured
from fuzz.targets.every import TARGETS

INPUTS = int(os.environ.get("FUZZ_INPUTS", "2000"))
REPEATABLE = not os.environ.get("FUZZ_FRESH")
MARKED = [pytest.param(t, id=t.name, marks=[pytest.mark.slow] if t.slow else []) for t in TARGETS.values()]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    logging.disable()
    with Sandbox() as box:
        yield box
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", MARKED)
def test_whatever_the_bytes_a_parser_stays_within_its_bounds(target: Target, sandbox: Sandbox) -> None:
    @settings(
        max_examples=INPUTS // 10,
        deadline=None,
        derandomize=REPEATABLE,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @example(b"")
    @given(st.binary(max_size=60))
    def read(entropy: bytes) -> None:
        sandbox.strays.clear()
        check(target, entropy, sandbox, measure=is_measured(entropy))

    read()
    rng = random.Random(0 if REPEATABLE else time.time_ns())
    for _ in range(INPUTS - INPUTS // 10):
        entropy = rng.randbytes(rng.randrange(60))
        try:
            check(target, entropy, sandbox, measure=is_measured(entropy))
        except Exception as error:
            raise AssertionError(
                f"{target.name}: python -m fuzz --target {target.name!r} --again {entropy.hex()}"
            ) from error


@pytest.mark.parametrize("target", [pytest.param(t, id=t.name) for t in TARGETS.values()])
def test_a_good_input_is_taken(target: Target, sandbox: Sandbox) -> None:
    assert check(target, b"", sandbox) == ""
