"""``fleetune assets``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fleetune.tools.commands.options import add_command


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "assets",
        summary="list or fetch the backbones and data sets that Fleetune knows",
        description=(
            "List the backbones and data sets that Fleetune knows by name, or fetch them into the cache\n"
            "($FLEETUNE_CACHE, by default ~/.cache/fleetune). Every file is checked against a pinned SHA-256."
        ),
        examples="  fleetune assets\n  fleetune assets --json\n  fleetune assets minilm rotten-tomatoes\n",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch; none to list all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from fleetune.edge.protocol.errors import AssetError
    from fleetune.tools.assets import ASSETS, fetch

    unknown = [name for name in args.names if name not in ASSETS]
    if unknown:
        raise AssetError(f"{', '.join(unknown)} is unknown", f"choose from {', '.join(ASSETS)}")
    rows = [
        {"name": a.name, "kind": a.kind, "licence": a.licence, "notes": a.notes}
        | ({"path": str(fetch(a.name))} if a.name in args.names else {})
        for a in ASSETS.values()
        if not args.names or a.name in args.names
    ]
    if args.json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    for row in rows:
        print(f"{row['name']:18}{row['kind']:10}{row['licence']:27} {row.get('path') or row['notes']}")  # noqa: T201
