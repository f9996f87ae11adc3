"""``fleetune status``."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command

if TYPE_CHECKING:
    from fleetune.server.privacy import Guarantee
    from fleetune.server.store import DeviceRow, RoundRow


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "status",
        summary="what an aggregator knows of its devices and rounds",
        description=(
            "Show the devices and the rounds of an aggregator, from its state folder, while it runs or afterwards:\n"
            "where each device stands, how many of its answers counted, came late or were refused and why, who is\n"
            "revoked or in quarantine; how many answers each round had, and how private the devices were, if they\n"
            "were. It changes nothing and needs no broker."
        ),
        examples="  fleetune status --state aggregator\n  fleetune status --state aggregator --json | jq .devices\n",
    )
    parser.add_argument(
        "--state", metavar="DIR", type=Path, required=True, help="the aggregator's folder, as `fleetune serve` has it"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="newest rounds to show (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import json
    import sqlite3
    from contextlib import closing
    from dataclasses import asdict

    from msgspec import to_builtins

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.server.store import FILE, Store
    from fleetune.tools.text import columns

    path = args.state / FILE
    if not path.is_file():
        raise ConfigError(f"--state: there is no {path}", "name the folder that `fleetune serve` was started with")
    if args.rounds < 1:
        raise ConfigError(f"--rounds: {args.rounds} is out of range", "use 1 or more")
    try:
        with closing(Store(path, only_look=True)) as store:
            devices = store.devices()
            jobs = store.jobs()
            rounds = [row for job in jobs for row in store.rounds(job)]
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path}: {error}", "start `fleetune serve` again: it makes the file anew") from error
    private = {job: found for job in jobs if (found := _guarantee(args.state, job)) is not None}
    if args.json:
        document = {
            "devices": [asdict(row) for row in devices],
            "rounds": [_as_json(row) for row in rounds],
            "privacy": {job: to_builtins(guarantee) for job, guarantee in private.items()},
        }
        print(json.dumps(document, indent=1))  # noqa: T201
        return
    head = ["device", "state", "last heard", "starts", "answers", "late", "refused", "last reason", "says"]
    print(columns([head, *map(_device, devices)]))  # noqa: T201
    head = ["job", "stage", "round", "depth", "answers", "late", "closed", "accuracy"]
    print()  # noqa: T201
    print(columns([head, *map(_round, rounds[-args.rounds :])]))  # noqa: T201
    for job, guarantee in private.items():
        print(f"\n{job}: {guarantee.in_words()}")  # noqa: T201


def _guarantee(state: Path, job: str) -> Guarantee | None:
    """What is said of a job's privacy, if it has any.

    Raises:
        ConfigError: The file is damaged.
    """
    import msgspec

    from fleetune.edge.protocol.errors import UNDECODABLE, ConfigError
    from fleetune.server.privacy import FILE, Guarantee

    path = state / job / FILE
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Guarantee)
    except UNDECODABLE as error:
        raise ConfigError(f"{path}: {error}", "start `fleetune serve` again: it makes the file anew") from error


def _device(row: DeviceRow) -> list[str]:
    counts = (row.boot or 0, row.accepted, row.late, row.refused)
    state = ", ".join(word for word in (row.state, row.quarantined and f"quarantined: {row.quarantined}") if word)
    words = (row.reason, row.detail)
    return [row.id, state or "-", _time(row.last_seen), *map(str, counts), *(word or "-" for word in words)]


def _round(row: RoundRow) -> list[str]:
    announced = row.announcement
    depth = str(announced.settings.get("depth", "-"))
    val = f"{row.means['val']:.3f}" if "val" in row.means else "-"
    counts = (str(announced.round), depth, str(row.answers), str(row.late))
    return [announced.job, announced.stage, *counts, _time(row.closed) if row.closed else "open", val]


def _as_json(row: RoundRow) -> dict[str, Any]:
    announced = row.announcement
    return {
        "job": announced.job,
        "version": announced.version,
        "stage": announced.stage,
        "round": announced.round,
        "closed": row.closed,
        "answers": row.answers,
        "late": row.late,
        "means": row.means,
    }


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
