"""``fleetune profile``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetune.tools.commands.options import add_command, add_pack, add_threads, check_threads

if TYPE_CHECKING:
    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.resources.probes.machine import Machine
    from fleetune.profiles.profile import Profile

_PICTURES = (".png", ".svg", ".pdf")
_BUSY = 0.1
"""Median error of a step's time above which other work disturbed the trials: alone it is 1 to 4 %."""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "profile",
        summary="measure what training costs on this device",
        description=(
            "Run real training steps of a pack at several depths, micro-batches and lengths, each in a process of its\n"
            "own under a limit, so that none can take the machine down. A model of memory and time is fitted to them,\n"
            "and the trials are written into a profile, beside what the board's maker declares. An agent whose fleet\n"
            "file names that profile does not measure again, and `fleetune plan` answers from it without the device.\n"
            "Needs only the plain install; --picture needs matplotlib (the `server` extra)."
        ),
        examples=(
            "  fleetune profile --pack packs/minilm --out cam.yaml                      on the device\n"
            "  fleetune profile --pack packs/minilm --out cam.yaml --data samples.jsonl --memory 160MiB\n"
            "  fleetune profile --pack packs/minilm --out cam.yaml --board my-board.yaml --picture cam.png\n"
            "  fleetune profile --pack packs/minilm --show cam.yaml --picture cam.png   on a workstation, later\n"
        ),
    )
    add_pack(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--out", metavar="FILE", type=Path, help="profile to write, or to add to if it is there")
    which.add_argument("--show", metavar="FILE", type=Path, help="measure nothing: show what a profile holds")
    parser.add_argument(
        "--board", metavar="NAME", help="a shipped profile or a file of your own (default: what the device tree says)"
    )
    longest = parser.add_mutually_exclusive_group()
    longest.add_argument("--data", metavar="FILE", type=Path, help="measure up to the longest sample of this data file")
    longest.add_argument("--length", metavar="T", type=int, help="measure up to so many tokens (default: the pack's)")
    parser.add_argument("--memory", metavar="SIZE", help="a budget, such as 160MiB, for the table and the picture")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw it: .png, .svg or .pdf")
    add_threads(parser, "training")
    parser.add_argument("--json", action="store_true", help="print the table and the trials as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    import dataclasses

    import msgspec

    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.profile import read_profile
    from fleetune.profiles.yamlfile import read_size
    from fleetune.tools.profile.summary import fit, table, text, threads_in_words
    from fleetune.tools.require import require_server_extra

    check_threads(args.threads)
    for option, path in (("--out", args.out), ("--picture", args.picture)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{option}: {path} cannot be written", "name a file in a folder that is there")
    if args.show is not None and (args.board or args.data or args.length or args.threads):
        raise ConfigError("--show: measures nothing", "leave out --board, --data, --length and --threads, or use --out")
    budget = None if args.memory is None else read_size("--memory", args.memory).mib
    if args.picture is not None:
        require_server_extra()
        if args.picture.suffix.lower() not in _PICTURES:
            raise ConfigError(f"--picture: {args.picture} is no picture", f"end its name in {', '.join(_PICTURES)}")
    pack = Pack.open(args.pack)
    path = args.out or args.show
    profile = read_profile(str(path.absolute())) if args.show else _measure(args, pack)
    found = [measured for measured in profile.measured if measured.costs.pack == pack.sha256]
    if not found:
        packs = ", ".join(sorted({measured.backbone for measured in profile.measured})) or "none"
        raise ConfigError(
            f"--show: {path} holds no trials of the pack {args.pack}, but of these: {packs}",
            "name the pack that was measured, or measure this one with --out",
        )
    measured = max(found, key=lambda some: some.taken)
    costs, cells = measured.costs, table(measured.costs, pack.manifest.blocks)
    errors = fit(costs)
    if errors.step[0] > _BUSY:
        print(  # noqa: T201
            f"the machine was busy: the model is off by {errors.step[0]:.0%} of a step's time; measure again later",
            file=sys.stderr,
        )
    title = f"{measured.backbone} on {measured.device}, {costs.power_mode}"
    if args.picture is not None:
        from fleetune.tools.profile.picture import draw

        draw(args.picture, title, costs, cells, budget)
    if args.json:
        document = {
            "profile": str(path),
            "board": profile.board,
            "budget_mib": budget,
            "errors": dataclasses.asdict(errors),
            "table": [dataclasses.asdict(cell) for cell in cells],
            "measured": msgspec.to_builtins(measured),
        }
        print(json.dumps(document, indent=2))  # noqa: T201
        return
    if len(found) > 1:
        print(f"{path} holds {len(found)} tables of this pack; this is the newest", file=sys.stderr)  # noqa: T201
    print(  # noqa: T201
        f"{path}: {title}\n"
        f"{len(costs.trials)} trials, {threads_in_words(costs)}; "
        f"before training a process takes {costs.model.base_mib:.0f} MiB\n"
        f"error of the model, median and worst: {errors.peak[0]:.1%}, {errors.peak[1]:.1%} of the peak;\n"
        f"{errors.step[0]:.1%}, {errors.step[1]:.1%} of a step's time\n\n"
        f"peak and seconds of a step, samples of {costs.length} tokens, by micro-batch"
        f"{'' if budget is None else f'; [over {budget:.0f}]'}\n"
        f"{text(cells, budget)}"
    )


def _measure(args: argparse.Namespace, pack: Pack) -> Profile:
    import time

    import msgspec

    from fleetune.edge.engine.dataset import read_dataset
    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.edge.resources.costs import measure
    from fleetune.edge.resources.headroom import Headroom
    from fleetune.edge.resources.probes.machine import probe
    from fleetune.profiles.measured import Measured
    from fleetune.profiles.profile import write_profile
    from fleetune.tools.text import Bar

    longest = pack.manifest.longest if args.length is None else args.length
    if not 1 <= longest <= pack.manifest.longest:
        raise ConfigError(f"--length: {longest} is out of range", f"the pack takes 1 to {pack.manifest.longest} tokens")
    if args.data is not None:
        longest = int(read_dataset(args.data, pack, needed=()).lengths.max())
    machine = probe()
    profile = _board(args, machine)
    for note in machine.skipped:
        print(f"could not be read: {note}", file=sys.stderr)  # noqa: T201
    memory_mib = machine.memory.total_mib or 0.0
    if profile.memory is not None and memory_mib > profile.memory.mib:
        raise ConfigError(
            f"--board: this machine has {memory_mib:.0f} MiB, the profile {profile.name} says {profile.memory}",
            "copy that profile, correct the copy, and name its file with --board",
        )
    for other in profile.measured:  # what is there shall not be replaced by less
        if not other.costs.stale(pack, length=longest, threads=args.threads):
            longest = other.costs.length
    costs = measure(
        pack,
        threads=args.threads,
        longest=longest,
        limit_mib=Headroom().spare_mib(),
        on_trial=Bar("measures"),
    )
    measured = Measured(
        taken=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=machine.board or machine.processor.model or "unknown",
        kernel=machine.kernel or "unknown",
        memory_mib=memory_mib,
        backbone=pack.manifest.backbone.id,
        costs=costs,
    )
    others = [other for other in profile.measured if not measured.replaces(other)]
    written = msgspec.structs.replace(profile, name=args.out.stem, measured=(*others, measured))
    write_profile(args.out, written)
    return written


def _board(args: argparse.Namespace, machine: Machine) -> Profile:
    """What is declared of this board: as the file that is added to says, or as it was named, or as it is known."""
    import platform

    from fleetune.edge.protocol.errors import ConfigError
    from fleetune.profiles.profile import detect_profile, profile_names, read_profile

    if args.out.is_file():
        profile = read_profile(str(args.out.absolute()))
        if args.board is not None and read_profile(args.board).board != profile.board:
            raise ConfigError(
                f"--board: {args.out} is of another board: {profile.board}", "leave the option out, or name a new file"
            )
        return profile
    if args.board is not None:
        return read_profile(args.board)
    found = detect_profile(machine.board, machine.memory.total_mib, platform.machine())
    if found is None:
        raise ConfigError(
            f"--board: no shipped profile is of this board ({machine.board or platform.machine()}, "
            f"{machine.memory.total_mib or 0:.0f} MiB)",
            f"name the one that comes closest ({', '.join(profile_names())}), or a file of your own (docs/profiles.md)",
        )
    return found
