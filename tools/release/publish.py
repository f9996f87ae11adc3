"""Builds and packs, as archives that a release names by what is in them."""

from __future__ import annotations

import shutil
from pathlib import Path

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import AssetError, SignatureError
from fleetune.edge.protocol.identity.signature import ENDING, PACK_FILE
from fleetune.edge.protocol.topics import check_name
from fleetune.tools.flash.record import check_record
from fleetune.tools.places import KITS
from fleetune.tools.release.rollout import Part
from fleetune.tools.trees import SHORT, extract, set_modes, tree_digest, write_tar_gz


def kit_of(record: Path, scratch: Path) -> tuple[str, Part, Path]:
    """The kit of a build.

    Args:
        record: Of the build.
        scratch: For the archive.

    Returns:
        Its tier, what a rollout says of it, and its archive.

    Raises:
        SignatureError: A file of the build is another.
        AssetError: The build has no kit.
    """
    build = check_record(record)
    overlay = next((record.parent / name for name in build.files if name.endswith(".overlay.tar.gz")), None)
    tree = scratch / f"kit-{build.tier}"
    tree.mkdir()
    if overlay is not None:
        extract(overlay, tree, below=str(KITS / build.kit))
    digest = tree_digest(tree)
    if not digest.startswith(build.kit):
        raise AssetError(f"{record} has no kit {build.kit}", "build it anew: `fleetune flash build`")
    archive = scratch / f"kit-{build.tier}-{build.kit}.tar.gz"
    write_tar_gz(tree, archive)
    return build.tier, Part(archive.name, digest), archive


def pack_of(pack: Path, scratch: Path) -> tuple[str, Part, Path]:
    """A pack, with its signature.

    Args:
        pack: Its folder.
        scratch: For the archive.

    Returns:
        Its name, what a rollout says of it, and its archive.

    Raises:
        PackError: It is damaged.
        SignatureError: It is not signed, and no agent of a fleet would take it.
    """
    Pack.open(pack)
    name = pack.resolve().name
    check_name("--pack", name)
    if not (pack / f"{PACK_FILE}{ENDING}").is_file():
        raise SignatureError(f"{pack} is not signed", f"sign it: `fleetune fleet sign {pack}`")
    tree = scratch / f"pack-{name}"
    shutil.copytree(pack, tree, copy_function=shutil.copyfile)
    set_modes(tree)
    digest = tree_digest(tree)
    archive = scratch / f"pack-{name}-{digest[:SHORT]}.tar.gz"
    write_tar_gz(tree, archive)
    return name, Part(archive.name, digest), archive
