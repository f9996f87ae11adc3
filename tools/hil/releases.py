"""Builds that are a little unlike another: what a board is given to see whether it takes a release, or goes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.flash.record import ENDING, Build, read_record, write_record
from fleetune.tools.places import KITS
from fleetune.tools.trees import SHORT, extract, tree_digest, write_tar_gz


def forget_wheels(package: Path) -> None:
    """Break a kit, as a change for `build_like`: an agent imports these. Without them it is sooner on a board, too."""
    for name in ("numpy", "numpy.libs", "onnxruntime"):
        shutil.rmtree(package.parent / name)


def build_like(record: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """Make a build whose kit is a little another.

    Args:
        record: Of the build that it is like.
        folder: For the new one.
        change: Called with the folder of Fleetune in its kit.

    Returns:
        The new one's record.
    """
    like, kits = read_record(record), folder / "tree" / KITS
    (overlay,) = (name for name in like.files if name.endswith(".overlay.tar.gz"))
    extract(record.parent / overlay, kits / like.kit, below=str(KITS / like.kit))
    (package,) = kits.glob("*/lib/*/site-packages/fleetune")
    change(package)
    kit = tree_digest(kits / like.kit)[:SHORT]
    (kits / like.kit).rename(kits / kit)
    write_tar_gz(folder / "tree", folder / overlay, level=1)  # it is soon forgotten
    build = Build(1, like.fleetune, like.tier, kit, {overlay: file_sha256(folder / overlay)})
    write_record(build, folder / f"another{ENDING}")
    return folder / f"another{ENDING}"
