"""What is asked: a round's samples, and the limits that it has to keep."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from fleetune.edge.engine.dataset import read_dataset
from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.resources.limits import Budget
from fleetune.edge.resources.workload import Workload
from fleetune.profiles.yamlfile import read_size

EVALUATED = 5
"""Of so many training samples one more is there for validation, and one more for a test."""


def workload(args: argparse.Namespace, pack: Pack) -> Workload:
    """The round that the options describe.

    Raises:
        ConfigError: An option is out of range.
        DataError: The data file cannot be used.
    """
    manifest = pack.manifest
    max_depth = args.max_depth if args.max_depth is not None else manifest.blocks
    for option, value, most in (
        ("--max-depth", max_depth, manifest.blocks),
        ("--epochs", args.epochs, 10_000),
        ("--batch", args.batch, 10_000),
        ("--samples", args.samples, 10_000_000),
        ("--length", args.length, manifest.longest),
    ):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{option}: {value} is out of range", f"choose from 1 to {most}")
    some = {"epochs": args.epochs, "batch": args.batch, "max_depth": max_depth}
    if args.data is not None:
        if args.length is not None:
            raise ConfigError(f"--length: {args.length}: samples of a data file have their own", "leave it out")
        return Workload.of(read_dataset(args.data, pack), manifest, **some)
    others = 2 * -(-args.samples // EVALUATED)
    lengths = np.full(args.samples + others, args.length or manifest.longest)
    return Workload.of_lengths(lengths[: args.samples], lengths[args.samples :], manifest, **some)


def budget(given: Budget, what_ifs: Iterable[str], deadline: float | None) -> Budget:
    """A budget with some limits replaced.

    Args:
        given: The budget.
        what_ifs: ``NAME=VALUE``, named as in a fleet file.
        deadline: Seconds a round.

    Raises:
        ConfigError: A limit is unknown or out of range.
    """
    changes = dict[str, float]()
    for text in [*what_ifs, *([] if deadline is None else [f"seconds={deadline}"])]:
        name, equals, value = text.partition("=")
        if not equals or name not in _LIMITS:
            raise ConfigError(
                f"--what-if: {text!r} is no limit", f"write one of {', '.join(f'{n}=…' for n in _LIMITS)}"
            )
        field, read = _LIMITS[name]
        if field in changes:
            raise ConfigError(f"--what-if: {name} is given twice", "give each limit once; --deadline is seconds")
        changes[field] = read(f"--what-if {name}", value)
    return msgspec.structs.replace(given, **changes)


def _amount(option: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{option}: {value!r} is out of range", "write a number above zero")
    return found


def _mib(option: str, value: str) -> float:
    return read_size(option, value).mib


_LIMITS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "memory": ("memory_mib", _mib),
    "cpu_seconds": ("cpu_s", _amount),
    "seconds": ("deadline_s", _amount),
    "joules": ("joules", _amount),
    "disk": ("disk_mib", _mib),
}
