"""The content tree: what a kit adds to a board's file system, laid out once for all that is made of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError
from fleetune.edge.protocol.files import file_sha256
from fleetune.edge.protocol.topics import check_name
from fleetune.tools.flash.tier import Tier
from fleetune.tools.flash.wheelhouse import Wheel, install_wheels
from fleetune.tools.places import KITS, MANIFEST, PACKS, TMPFILES, UNITS, UPDATES, WANTED
from fleetune.tools.trees import EPOCH, SHORT, set_modes, tree_digest, walk

_PACKAGES = ("edge", "server", "profiles", "tools")

_MAIN = """\
import sys

from fleetune.tools.cli import main

sys.argv[0] = "fleetune"
main()
"""


@dataclass(frozen=True)
class Content:
    """A tree that is laid out.

    Attributes:
        root: Its folder.
        tier: What it is for.
        version: Of Fleetune.
        kit: Name of the kit's folder below `KITS`: the first digits of its SHA-256.
        wheels: What the kit has beside Fleetune.
        packs: Names of the packs, below `PACKS`.
    """

    root: Path
    tier: Tier
    version: str
    kit: str
    wheels: tuple[Wheel, ...]
    packs: tuple[str, ...]

    def files(self) -> Iterator[Path]:
        """All files and links, in an order that is always the same."""
        yield from (path for path in walk(self.root) if path.is_symlink() or not path.is_dir())


def lay_out(root: Path, tier: Tier, wheels: Iterable[Wheel], packs: Iterable[Path] = ()) -> Content:
    """Fill ``root`` with what a board of this tier gets.

    Args:
        root: An empty folder.
        tier: Of the board.
        wheels: What Fleetune needs there.
        packs: Folders of packs that come along; each keeps its name.

    Raises:
        AssetError: A wheel is not for this tier.
        ConfigError: Two packs have one name.
    """
    root.chmod(0o755)
    shutil.copytree(Path(__file__).with_name("tree"), root, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for (
        target,
        unit,
    ) in WANTED.items():  # nothing runs when an overlay is unpacked, so they are enabled as they lie there
        wanted = root / UNITS / f"{target}.wants" / unit
        wanted.parent.mkdir()
        wanted.symlink_to(f"../{unit}")
    kits = root / KITS
    kits.mkdir()
    wheels, scratch = tuple(sorted(wheels, key=lambda wheel: wheel.name)), kits / "kit"
    _lay_out_kit(scratch, tier, wheels)
    set_modes(root)
    kit = tree_digest(scratch)[:SHORT]
    scratch.rename(kits / kit)
    (kits / "current").symlink_to(kit)
    names = _lay_out_packs(root, packs)
    version = importlib.metadata.version("fleetune")
    content = Content(root, tier, version, kit, wheels, names)
    _write_manifest(content)
    set_modes(root)
    for path in walk(root):
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)
    os.utime(root, (EPOCH, EPOCH))
    return content


def _lay_out_kit(kit: Path, tier: Tier, wheels: tuple[Wheel, ...]) -> None:
    """A virtual environment as Python's own venv makes it, without anything of this machine."""
    site = kit / "lib" / f"python{tier.minor}" / "site-packages"
    site.mkdir(parents=True)
    install_wheels(tier, wheels, site)
    shutil.rmtree(site / "bin", ignore_errors=True)  # they start with the name of this machine's Python
    for folder in [path for path in walk(site) if path.name == "__pycache__"]:
        shutil.rmtree(folder)
    for name in _PACKAGES:
        here = Path(str(importlib.import_module(f"fleetune.{name}").__file__)).parent
        shutil.copytree(
            here, site / "fleetune" / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
        )
    own = importlib.metadata.distribution("fleetune")
    metadata = site / f"fleetune-{own.version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(own.read_text("METADATA") or own.read_text("PKG-INFO") or "", encoding="utf-8")
    programs = kit / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(f"/usr/bin/python{tier.minor}")
    (programs / "fleetune").write_text(_MAIN, encoding="utf-8")
    (kit / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n", encoding="utf-8")


def _lay_out_packs(root: Path, packs: Iterable[Path]) -> tuple[str, ...]:
    """Packs, each with a link where an update may put another in its place."""
    names = []
    for pack in packs:
        name = pack.resolve().name
        if name in names:
            raise ConfigError(f"--pack: two packs are called {name}", "rename one of the folders")
        check_name("--pack", name)
        shutil.copytree(pack, root / PACKS / name, copy_function=shutil.copyfile)
        names.append(name)
    places = [
        f"d /{UPDATES}/packs 0755 root root",
        *(f"L /{UPDATES}/packs/{name} - - - - /{PACKS}/{name}" for name in names),
    ]
    (root / TMPFILES / "fleetune-packs.conf").write_text("".join(f"{line}\n" for line in places), encoding="utf-8")
    return tuple(names)


def _write_manifest(content: Content) -> None:
    """What is there, by hash: what a board can be held against, and what a release names."""
    document = {
        "schema": 1,
        "fleetune": content.version,
        "tier": content.tier.name,
        "python": content.tier.minor,
        "kit": content.kit,
        "packs": list(content.packs),
        "wheels": {wheel.file.name: wheel.sha256 for wheel in content.wheels},
        "files": {
            path.relative_to(content.root).as_posix(): file_sha256(path)
            for path in content.files()
            if not path.is_symlink()
        },
    }
    file = content.root / MANIFEST
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
