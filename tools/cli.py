"""The ``fleetune`` command."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from fleetune.tools.text import LineFormatter, visible

if TYPE_CHECKING:
    from fleetune.edge.protocol.errors import FleetuneError

COMMANDS = (
    "demo",
    "pack",
    "serve",
    "status",
    "agent",
    "fleet",
    "flash",
    "hil",
    "release",
    "update",
    "enroll",
    "firstboot",
    "verify",
    "doctor",
    "profile",
    "plan",
    "predict",
    "export",
    "broker",
    "assets",
    "bench",
    "experiment",
)
"""Modules of ``fleetune.tools.commands``, in the order in which the help lists them."""

_EPILOGUE = """\
examples:
  fleetune demo                                   a whole fleet on this machine, in a few minutes
  fleetune pack minilm --out packs/minilm         compile a backbone for devices
  fleetune doctor                                 what is wrong with this device
  fleetune profile --pack packs/minilm --out cam.yaml
                                                  what training costs here
  fleetune fleet init --fleet fleet.yaml --host broker
                                                  an authority, which says who belongs to the fleet
  fleetune serve --fleet fleet.yaml --pack packs/minilm --classes 2 --state aggregator
  fleetune agent --fleet fleet.yaml --id nano-1 --pack packs/minilm --data samples.jsonl --state /var/lib/fleetune

Every error has an exit code of its own; docs/exit-codes.md explains each.
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line: the whole of it, or as much as a command needs, which is sooner there on a small processor."""
    parser = argparse.ArgumentParser(
        prog="fleetune",
        description="Fine-tune foundation models on fleets of small devices, privately and personally.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fleetune {version('fleetune')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in [command] if command in COMMANDS else COMMANDS:
        importlib.import_module(f"fleetune.tools.commands.{name}").register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(next(iter(words), None)).parse_args(words)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("fleetune").setLevel(logging.INFO)  # of libraries, what is wrong
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(args.run(args) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _leave(error)
        raise


def _leave(error: Exception) -> None:
    """End with an error's own code; return if nobody foresaw it."""
    # Not at the top: `fleetune doctor` must start where msgspec, which this imports, crashes.
    from fleetune.edge.protocol.errors import FileAccessError, FleetuneError

    if isinstance(error, FleetuneError):
        _fail(error)
    if isinstance(error, BrokenPipeError):
        if not _reader_has_gone():
            _fail(FileAccessError(str(error), "see what ended the process at the other end"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its end
        sys.exit(141)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _fail(FileAccessError(what, "check the path, its permissions and the room on the disk"))


def _fail(error: FleetuneError) -> NoReturn:
    print(f"error: {visible(error.what)}\nremedy: {visible(error.remedy)}", file=sys.stderr)  # noqa: T201
    sys.exit(error.exit_code)


def _reader_has_gone() -> bool:
    """Whether it was standard output that broke, such as before `| head`: then nobody wants more."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """A service that is told to stop leaves through its ``finally`` blocks, and that is a success."""
    sys.exit(0)


if __name__ == "__main__":
    main()
