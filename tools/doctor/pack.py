"""A pack on this device: whether it is whole, and one real training step."""

from __future__ import annotations

import math
from pathlib import Path

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import BudgetError, FileAccessError, FleetuneError
from fleetune.edge.resources.confine import Killed
from fleetune.edge.resources.headroom import Headroom
from fleetune.edge.resources.trial import Request, run_trial
from fleetune.tools.doctor.host import Check

PACK = 34
"""Exit code of the check."""


def check_pack(path: Path, *, limit_mib: float | None = None) -> Check:
    """Whether every file is the one that was packed, and a step at depth 1 trains.

    Args:
        path: The pack's folder.
        limit_mib: MiB that the step may take; by default what can be had now.
    """
    try:
        pack = Pack.open(path)
    except FleetuneError as error:
        return Check("pack", "failure", error.what, error.remedy, PACK)
    except OSError as error:
        return Check("pack", "failure", str(error), "see that this user may read it", PACK)
    request = Request(
        pack=str(path), depth=1, micro_batch=1, length=pack.manifest.longest, recompute=False, threads=0, steps=1
    )
    try:
        trial = run_trial(request, limit_mib=_left_mib() if limit_mib is None else limit_mib)
    except BudgetError as error:
        remedy = "see the check of the wheels, write the pack again with `fleetune pack`, or use a smaller backbone"
        return Check("pack", "failure", f"{path}: {error.what}", remedy, PACK)
    if isinstance(trial, Killed):
        return Check(
            "pack",
            "failure",
            f"{path}: a step at depth 1 takes more than the {trial.limit_mib:.0f} MiB that can be had",
            "stop other programs, pack with a smaller --max-length, or use a smaller backbone",
            PACK,
        )
    found = f"{path}: whole; a step at depth 1 took {trial.step_s:.2g} s and {math.ceil(trial.peak_mib)} MiB"
    return Check("pack", "ok", found)


def _left_mib() -> float | None:
    try:
        return Headroom().spare_mib()
    except FileAccessError:
        return None  # the check of the memory says so
