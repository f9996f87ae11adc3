"""A pack on this device: whether it is whole, and one real training step."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import msgspec

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import FileAccessError, FleetuneError
from fleetune.edge.resources.confine import Killed, run_confined
from fleetune.edge.resources.headroom import Headroom
from fleetune.edge.resources.trial import Request, Trial
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.wheels import in_words

PACK = 34
"""Exit code of the check."""

_TRIAL = "fleetune.edge.resources.trial"
_TIMEOUT_S = 300.0


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
    what = f"{path}: a step at depth 1"
    try:
        done = run_confined(
            _TRIAL, msgspec.json.encode(request), limit_mib=limit_mib or _left_mib(), timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Check("pack", "failure", f"{what} takes longer than {_TIMEOUT_S:.0f} s", "use a smaller backbone", PACK)
    if isinstance(done, Killed):
        return Check(
            "pack",
            "failure",
            f"{what} takes more than the {done.limit_mib:.0f} MiB that can be had",
            "stop other programs, pack with a smaller --max-length, or use a smaller backbone",
            PACK,
        )
    if wrong := in_words(done):
        remedy = "see the check of the wheels, or write the pack again with `fleetune pack`"
        return Check("pack", "failure", f"{what} failed: {wrong}", remedy, PACK)
    trial = msgspec.json.decode(done.stdout, type=Trial)
    found = f"{path}: whole; a step at depth 1 took {trial.step_s:.2g} s and {math.ceil(trial.peak_mib)} MiB"
    return Check("pack", "ok", found)


def _left_mib() -> float | None:
    try:
        return Headroom().spare_mib()
    except FileAccessError:
        return None  # the check of the memory says so
