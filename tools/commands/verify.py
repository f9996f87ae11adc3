"""``fleetune verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "verify",
        summary="see that packs, releases and images are what the fleet's publisher has signed",
        description=(
            "Verify files, packs with all their files, or builds (*.build.json) with all theirs, against the\n"
            "signatures beside them (FILE.sig), as `fleetune fleet sign` made them. Whom to believe is in the\n"
            "identity of this machine."
        ),
        examples=(
            "  fleetune verify packs/minilm --identity /var/lib/fleetune/identity\n"
            "  fleetune verify fleetune-0.1.0-py3-none-any.whl image.img --identity authority/members/publisher\n"
        ),
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", type=Path, help="files, or folders of packs")
    parser.add_argument("--identity", metavar="DIR", type=Path, required=True, help="folder of an identity")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from datetime import datetime

    from fleetune.edge.pack.pack import Pack
    from fleetune.edge.protocol.identity.folder import read_identity
    from fleetune.edge.protocol.identity.signature import check_file
    from fleetune.tools.flash.record import ENDING, check_record

    trust = read_identity(args.identity).trust
    for path in args.paths:
        signed = check_file(path, trust)
        if path.is_dir():
            Pack.open(path)
        elif path.name.endswith(ENDING):
            check_record(path)
        when = datetime.fromtimestamp(signed.issued).astimezone()
        print(f"{path}: signed by the publisher of the fleet {trust.fleet} on {when:%Y-%m-%d %H:%M}")  # noqa: T201
