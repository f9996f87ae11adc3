"""``fleetune flash image``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command
from fleetune.tools.text import say


def register(actions: Any) -> None:
    """Add the action."""
    parser = add_command(
        actions,
        "image",
        summary="a bootable file system for the emulated board",
        description=(
            "Make a file system that the emulated board boots: Debian 12 for arm64 with the package in it that\n"
            "boards get, and its kernel beside it. The first takes minutes; Debian then comes from the cache, and an\n"
            "image of the same package stays as it is.\n\n"
            "Needs mmdebstrap, e2fsprogs and qemu-user-static, and a Debian archive\n"
            "(FLEETUNE_DEBIAN names another mirror)."
            " No loop device, and no root where user namespaces are allowed."
        ),
        examples=(
            "  fleetune flash build --tier t4 --pack packs/minilm\n"
            "  fleetune flash image images/fleetune_0.1.0+t4_arm64.deb\n"
        ),
    )
    parser.add_argument("deb", metavar="DEB", type=Path, help="package of tier t4, from `fleetune flash build`")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("images"), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the files as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from fleetune.tools.emulator.image import make_image

    image = make_image(args.deb, args.out, say)
    files = {name: str(path) for name, path in asdict(image).items()}
    print(json.dumps(files, indent=1) if args.json else "\n".join(files.values()))  # noqa: T201
