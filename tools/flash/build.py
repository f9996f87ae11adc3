"""Builds what is flashed: a Debian package, an overlay for a root file system, and what says what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError, RunFolderError, SignatureError
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.flash.content import lay_out
from fleetune.tools.flash.deb import write_deb
from fleetune.tools.flash.lockfile import locked
from fleetune.tools.flash.record import ENDING, Build, check_record, write_record
from fleetune.tools.flash.sbom import bill_of_materials
from fleetune.tools.flash.tier import Tier
from fleetune.tools.flash.wheelhouse import fetch_wheels
from fleetune.tools.staging import staged
from fleetune.tools.trees import tree_digest, write_tar_gz

MAINTAINER = "Fleet operator <root@localhost>"
"""Who answers for a package where nobody else is named."""


def build(
    tier: Tier,
    out: Path,
    *,
    packs: Iterable[Path] = (),
    own_wheels: Iterable[Path] = (),
    maintainer: str = MAINTAINER,
    say: Callable[[str], None],
) -> Path:
    """Build all of one tier.

    Args:
        tier: Of the boards.
        out: Folder for the files; those of an earlier build of the same tier are replaced, each at once, unless they
            are the same.
        packs: Packs that come along.
        own_wheels: Wheels in place of pinned ones.
        maintainer: Of the Debian package.
        say: Called with what is done next.

    Returns:
        The record of all files, beside them.

    Raises:
        AssetError: A wheel cannot be had, or is not the pinned one.
        ConfigError: A program is missing.
        RunFolderError: ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"--out: {out} is not a folder", "name a folder; it is made if it is missing")
    say(f"wheels for {tier.system}, Python {tier.minor}")
    wheels = fetch_wheels(tier, locked(tier), own_wheels)
    with staged(out) as scratch:
        say("content")
        root, made = scratch / "content", scratch / "made"
        root.mkdir()
        made.mkdir()
        content = lay_out(root, tier, wheels, packs)
        sbom = bill_of_materials(content)
        stem = f"fleetune_{content.version}+{tier.name}_arm64"
        made_from = hashlib.sha256("\0".join((tree_digest(root), sbom, maintainer)).encode()).hexdigest()
        record = out / f"{stem}{ENDING}"
        if _is_there(record, made_from):
            say(f"{record} is there")
            return record
        say("Debian package")
        write_deb(content, sbom, maintainer, scratch, made / f"{stem}.deb")
        say("overlay")
        write_tar_gz(root, made / f"{stem}.overlay.tar.gz")
        (made / f"{stem}.sbom.cdx.json").write_text(sbom, encoding="utf-8")
        hashes = {file.name: file_sha256(file) for file in sorted(made.iterdir())}
        record.unlink(missing_ok=True)  # until all that it names is there
        for file in sorted(made.iterdir()):
            file.replace(out / file.name)
        write_record(Build(1, content.version, tier.name, content.kit, hashes, made_from), record)
    return record


def _is_there(record: Path, made_from: str) -> bool:
    """Whether a build of the same lies there whole; one that is damaged is built anew."""
    try:
        return record.exists() and check_record(record).made_from == made_from
    except (ConfigError, SignatureError):
        return False
