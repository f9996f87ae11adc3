"""``fleetune pack``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fleetune.tools.commands.options import add_command

_WRITING = ("rank", "targets", "max_length", "image_size", "weights", "blocks", "extractor", "licence")
"""Options that shape a pack that is written."""


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "pack",
        summary="compile a backbone into a pack, or check one",
        description=(
            "Compile a backbone into a pack: quantised weights, and the ONNX graphs of its forward and backward\n"
            "passes. A device trains from the pack with ONNX Runtime and NumPy alone. BACKBONE is a folder in Hugging\n"
            "Face format (BERT or DINOv2), or the name of an asset (see `fleetune assets`). Needs the `pack` extra."
        ),
        examples=(
            "  fleetune pack minilm --out packs/minilm\n"
            "  fleetune pack models/my-bert --out packs/my-bert --rank 16 --targets query,key,value --max-length 128\n"
            "  fleetune pack focus-vit --out packs/vit --image-size 56\n"
            "  fleetune pack minilm --out packs/large --extractor\n"
            "  fleetune pack minilm --out packs/small --extractor --blocks 3      for one fleet, by --job pfedmoe\n"
            "  fleetune pack minilm --check packs/minilm      compare with torch, print the errors\n"
        ),
    )
    parser.add_argument("backbone", metavar="BACKBONE", help="folder in Hugging Face format, or name of an asset")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", type=Path, help="write the pack here; must not exist")
    what.add_argument("--check", metavar="DIR", type=Path, help="compare this pack with the torch reference")
    parser.add_argument("--rank", type=int, default=8, metavar="N", help="rank of the adapters (default: %(default)s)")
    parser.add_argument(
        "--targets",
        default="query,value",
        metavar="LIST",
        help="linear maps that carry an adapter: query, key, value, output, fc1, fc2 (default: %(default)s)",
    )
    parser.add_argument("--max-length", type=int, default=64, metavar="N", help="longest text (default: %(default)s)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the pictures (default: the backbone's)")
    parser.add_argument(
        "--weights",
        choices=("nf4", "int8", "fp32"),
        default="nf4",
        help="how matrices are stored: 0.56, 1.06 or 4 bytes a value (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="pack the first N blocks alone, for smaller boards (default: all)"
    )
    parser.add_argument(
        "--extractor",
        action="store_true",
        help="add the small network that devices with different backbones share, for pFedMoE",
    )
    parser.add_argument("--licence", default="unknown", metavar="ID", help="licence of the weights, for the manifest")
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    parser.set_defaults(run=_run, defaults={name: parser.get_default(name) for name in _WRITING})


def _run(args: argparse.Namespace) -> int:
    from fleetune.edge.protocol.errors import AssetError, ConfigError
    from fleetune.tools.assets import ASSETS, fetch
    from fleetune.tools.require import require_pack_extra

    require_pack_extra()
    for name in _WRITING if args.check else ():
        if getattr(args, name) != args.defaults[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for writing a pack", "leave it out: --check asks the pack"
            )
    if args.backbone in ASSETS:
        asset = ASSETS[args.backbone]
        source, name, licence, origin = fetch(asset.name), asset.name, asset.licence, str(asset.carrier)
    elif not Path(args.backbone).is_dir():
        backbones = ", ".join(name for name, asset in ASSETS.items() if asset.kind == "backbone")
        raise AssetError(
            f"BACKBONE: {args.backbone!r} is neither a folder nor an asset",
            f"name a folder in Hugging Face format, or one of {backbones}",
        )
    else:
        source, licence, origin = Path(args.backbone), args.licence, args.backbone
        name = source.name
    if args.check:
        return _check(args, source)
    return _write(args, source, name, licence, origin)


def _write(args: argparse.Namespace, source: Path, name: str, licence: str, origin: str) -> int:
    from fleetune.tools.pack.write import write_pack
    from fleetune.tools.terminal import open_console, show_steps

    console = open_console(stderr=True)
    with show_steps(console) as say:
        pack = write_pack(
            source,
            args.out,
            name=name,
            licence=licence,
            origin=origin,
            rank=args.rank,
            targets=args.targets.split(","),
            max_length=args.max_length,
            image_size=args.image_size,
            weights=args.weights,
            blocks=args.blocks,
            extractor=args.extractor,
            on_step=say,
        )
    manifest = pack.manifest
    size = sum(file.bytes for file in manifest.files.values()) / 2**20
    console.print(
        f"{args.out}: {manifest.backbone.id}, {manifest.blocks} blocks of width {manifest.width}, "
        f"rank {manifest.rank} on {', '.join(manifest.targets)}, {size:.1f} MiB, SHA-256 {pack.sha256[:12]}…",
        soft_wrap=True,
    )
    return 0


def _check(args: argparse.Namespace, source: Path) -> int:
    from rich.table import Table

    from fleetune.edge.pack.pack import Pack
    from fleetune.tools.pack.check import TOLERANCE, check_pack
    from fleetune.tools.terminal import open_console

    checks = check_pack(Pack.open(args.check), source)
    passed = all(check.passed for check in checks)
    if args.json:
        document = {
            "pack": str(args.check),
            "tolerance": TOLERANCE,
            "passed": passed,
            "checks": [{"what": check.what, "error": check.error, "passed": check.passed} for check in checks],
        }
        print(json.dumps(document, indent=2))  # noqa: T201
    else:
        table = Table("compared with torch", "largest error", "", title=f"{args.check} (tolerance {TOLERANCE:g})")
        for check in checks:
            table.add_row(check.what, f"{check.error:.1e}", "ok" if check.passed else "[red]too large[/red]")
        console = open_console(stderr=False)
        console.print(table)
        verdict = "computes what torch does" if passed else "does not compute what torch does: write it again"
        console.print(f"{args.check} {verdict}", soft_wrap=True)
    return 0 if passed else 1
