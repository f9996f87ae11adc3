"""Builds and packs, as archives that a release names by what is in them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from fleetune.edge.pack.pack import Pack
from fleetune.edge.protocol.errors import AssetError, SignatureError
from fleetune.edge.protocol.identity.signature import ENDING, PACK_FILE
from fleetune.edge.protocol.topics import check_name
from fleetune.tools.flash.record import check_record
from fleetune.tools.places import KITS
from fleetune.tools.release.repository import Releases
from fleetune.tools.release.rollout import Part, Rollout
from fleetune.tools.staging import staged
from fleetune.tools.trees import SHORT, extract, set_modes, tree_digest, write_tar_gz


def publish(
    releases: Releases, builds: Iterable[Path], packs: Iterable[Path], canaries: Iterable[str], share: float
) -> Rollout:
    """Publish a release: what is not named stays as it was.

    Args:
        releases: Of the fleet.
        builds: Records of builds, one for each tier.
        packs: Folders of packs, signed.
        canaries: Devices that get it first.
        share: Of the others, from 0 to 1.

    Returns:
        What goes to whom.

    Raises:
        AssetError: A build has no kit.
        PackError: A pack is damaged.
        SignatureError: A file of a build is another, or a pack is not signed.
    """
    before, archives = releases.rollout, dict[str, Path]()
    held_kits, held_packs = (dict(before.kits), dict(before.packs)) if before else ({}, {})
    with staged(releases.folder) as scratch:
        for record in builds:
            tier, part, archive = _kit_of(record, scratch)
            held_kits[tier], archives[part.target] = part, archive
        for pack in packs:
            name, part, archive = _pack_of(pack, scratch)
            held_packs[name], archives[part.target] = part, archive
        number = before.number + 1 if before else 1
        rollout = Rollout(1, number, held_kits, held_packs, tuple(dict.fromkeys(canaries)), share)
        releases.publish(rollout, archives)
    return rollout


def _kit_of(record: Path, scratch: Path) -> tuple[str, Part, Path]:
    """The tier of a build, what a rollout says of its kit, and the archive of that, in ``scratch``."""
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


def _pack_of(pack: Path, scratch: Path) -> tuple[str, Part, Path]:
    """The name of a pack, what a rollout says of it with its signature, and its archive, in ``scratch``."""
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
