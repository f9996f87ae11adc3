"""The identity of a run: a state folder holds one, and what its first announcement fixed stays as it was."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import msgspec

from fleetune.edge.protocol.errors import RunFolderError
from fleetune.server.job import Job
from fleetune.server.journal import Started


def identify(started: Started | None, folder: Path, fleet: str, jobs: tuple[Job, ...]) -> Started:
    """The run that a journal holds, or a new one.

    Args:
        started: How the journal's run began, if it did.
        folder: The journal's folder.
        fleet: The fleet that is asked for now.
        jobs: The jobs that are asked for now.

    Raises:
        RunFolderError: The journal holds a run of another fleet or with other jobs.
    """
    if started is None:
        return Started(secrets.token_hex(6), fleet, jobs)
    if changed := _differences(started, fleet, jobs):
        raise RunFolderError(
            f"{folder} holds a run with other options: {'; '.join(changed)}",
            "start it with the same options to go on, or name another folder with --state for a new run",
        )
    return started


def _differences(started: Started, fleet: str, jobs: tuple[Job, ...]) -> list[str]:
    if started.fleet != fleet:
        return [f"fleet {started.fleet} (now {fleet})"]
    before, now = (", ".join(job.id for job in some) for some in (started.jobs, jobs))
    if before != now:
        return [f"jobs {before} (now {now})"]
    return [f"{old.id}: {_changes(old, new)}" for old, new in zip(started.jobs, jobs, strict=True) if old != new]


def _changes(old: Job, new: Job) -> str:
    before, after = _flat(old), _flat(new)
    names = [name for name in before | after if before.get(name) != after.get(name)]
    words = [f"{name} {before.get(name, 'absent')} (now {after.get(name, 'absent')})" for name in names]
    return ", ".join(words) or "the pack has adapters of other shapes"


def _flat(job: Job) -> dict[str, Any]:
    """A job's fields by the names that an operator knows; the shapes follow from those and the pack."""
    fields = msgspec.to_builtins(job)
    del fields["shapes"]
    rounds = {f"{stage} rounds": number for stage, number in fields.pop("rounds").items()}
    rule = {"rule" if name == "name" else f"the rule's {name}": v for name, v in fields.pop("rule").items()}
    schedule = {f"SAL's {name}": value for name, value in fields.pop("schedule").items()}
    return {**rounds, **fields.pop("settings"), **schedule, **rule, **fields}
