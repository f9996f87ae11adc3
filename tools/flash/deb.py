"""A content tree as a Debian package. ``dpkg-deb`` writes it; what is not content lies in ``debian/``."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from email.utils import formatdate
from pathlib import Path

from fleetune.tools.flash.content import Content
from fleetune.tools.programs import find_program, run_program
from fleetune.tools.trees import EPOCH, walk

_HERE = Path(__file__).with_name("debian")
_SCRIPTS = ("postinst", "prerm", "postrm")


def write_deb(content: Content, sbom: str, maintainer: str, scratch: Path, file: Path) -> None:
    """Write the package; two of the same content are the same bytes.

    Args:
        content: What it installs.
        sbom: Its bill of materials.
        maintainer: Who answers for it: a name and an address.
        scratch: An empty folder on the file system of ``content``.
        file: The package.

    Raises:
        ConfigError: ``dpkg-deb`` is not there.
        RunFailedError: It fails.
    """
    program = find_program("dpkg-deb", "dpkg")
    root = scratch / "deb"
    shutil.copytree(content.root, root, symlinks=True, copy_function=os.link)
    said = {
        "version": f"{content.version}+{content.tier.name}",
        "maintainer": maintainer,
        "date": formatdate(EPOCH),
        "python": content.tier.minor,
        "system": content.tier.system,
    }
    _write(root / "usr/share/doc/fleetune/copyright", _text("copyright").encode())
    _write(root / "usr/share/doc/fleetune/sbom.cdx.json", sbom.encode())
    changelog = _text("changelog").format(**said).encode()
    _write(root / "usr/share/doc/fleetune/changelog.gz", gzip.compress(changelog, 9, mtime=EPOCH))
    _write(root / "usr/share/lintian/overrides/fleetune", _text("overrides").encode())
    files = [path for path in walk(root) if path.is_file() and not path.is_symlink()]
    sums = [f"{_md5(path)}  {path.relative_to(root).as_posix()}\n" for path in files]
    kib = sum(-(-path.lstat().st_size // 1024) for path in walk(root))
    _write(root / "DEBIAN/control", _text("control").format(**said, kib=kib).encode())
    _write(root / "DEBIAN/md5sums", "".join(sums).encode())
    for name in _SCRIPTS:
        _write(root / "DEBIAN" / name, _text(name).encode(), mode=0o755)
    for path in walk(root):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    # One thread: how many there are shows in what xz writes. Its higher levels take minutes for a tenth.
    run_program(
        [program, "--root-owner-group", "-Zxz", "-z1", "--threads-max=1", "--build", root, file],
        "see that the disk has room, and that dpkg is 1.21 or newer",
        env={"SOURCE_DATE_EPOCH": str(EPOCH)},
    )
    shutil.rmtree(root)


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _write(file: Path, content: bytes, mode: int = 0o644) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(mode)


def _md5(file: Path) -> str:
    """Debian's checksums are MD5, against decay and not against anybody."""
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
