"""A kit as a RAUC bundle, for a slot ``appfs`` that is mounted where kits lie that came as updates. ``rauc`` signs."""

from __future__ import annotations

from pathlib import Path

from fleetune.edge.protocol.errors import AssetError
from fleetune.tools.places import KITS
from fleetune.tools.programs import find_program, run_program
from fleetune.tools.staging import staged
from fleetune.tools.trees import extract, write_tar_gz

SLOT = "appfs"
_MANIFEST = """\
[update]
compatible={compatible}
version={version}
build={kit}

[bundle]
format=verity

[image.{slot}]
filename=kit.tar.gz
"""


def write_rauc(
    overlay: Path, out: Path, *, version: str, kit: str, compatible: str, key: Path, certificate: Path, keyring: Path
) -> None:
    """Write a bundle, and hold it against the keyring before it gets its name.

    Args:
        overlay: ``….overlay.tar.gz`` of a build.
        out: The bundle.
        version: Of Fleetune, and the tier.
        kit: Name of the kit.
        compatible: Of the boards, as their ``system.conf`` has it.
        key: Private key, PEM or PKCS #11.
        certificate: Its certificate.
        keyring: What the boards hold bundles against, PEM.

    Raises:
        AssetError: The overlay has no kit.
        ConfigError: ``rauc`` or ``mksquashfs`` is missing.
        RunFailedError: It fails.
    """
    program = find_program("rauc", "rauc")
    find_program("mksquashfs", "squashfs-tools")
    with staged(out.parent) as scratch:
        content, bundle = scratch / "content", scratch / out.name
        content.mkdir()
        text = _MANIFEST.format(compatible=compatible, version=version, kit=kit, slot=SLOT)
        (content / "manifest.raucm").write_text(text, encoding="utf-8")
        _take_kit(overlay, scratch, content / "kit.tar.gz")
        command = [program, "bundle", f"--cert={certificate}", f"--key={key}", f"--signing-keyring={keyring}"]
        run_program([*command, content, bundle], "see what it says; docs/flashing.md has an example with its keys")
        check_rauc(bundle, keyring)
        bundle.replace(out)


def check_rauc(bundle: Path, keyring: Path) -> None:
    """See that a bundle is whole, and signed.

    Raises:
        RunFailedError: It is not.
    """
    program = find_program("rauc", "rauc")
    run_program([program, "info", f"--keyring={keyring}", bundle], f"write {bundle.name} anew")


def _take_kit(overlay: Path, scratch: Path, target: Path) -> None:
    """What lies below `KITS`, by itself."""
    tree = scratch / "kits"
    tree.mkdir()
    extract(overlay, tree, below=str(KITS))
    if not (tree / "current").is_symlink():
        raise AssetError(f"{overlay} has no kit", "name the overlay of a build: `fleetune flash build`")
    write_tar_gz(tree, target)
