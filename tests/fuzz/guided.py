"""Coverage-guided runs: the same targets, with inputs that lead where none before them has.

``pip install atheris``, which is in no extra as it has wheels for x86-64 alone, then
``PYTHONPATH=tests python -m fuzz.guided NAME CORPUS -max_total_time=600``; what follows the name is libFuzzer's.
"""

from __future__ import annotations

import logging
import sys
import warnings

import atheris

with atheris.instrument_imports(include=["fleetune", "fuzz.mutations"]):
    from fuzz.target import Sandbox, check
    from fuzz.targets.every import TARGETS


def main() -> None:
    """Read inputs until libFuzzer ends, or one fails."""
    logging.disable()
    warnings.simplefilter("ignore")
    target = TARGETS[sys.argv[1]]
    with Sandbox() as sandbox:
        check(target, b"", sandbox, measure=False)
        atheris.Setup(
            [sys.argv[0], *sys.argv[2:]], lambda entropy: check(target, entropy, sandbox, measure=False) and None
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
