"""A content tree as a Debian package. ``dpkg-deb`` writes it."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
from email.utils import formatdate
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.tools.flash.content import EPOCH, Content, walk

_CONTROL = """\
Package: fleetune
Version: {version}
Architecture: arm64
Maintainer: {maintainer}
Installed-Size: {kib}
Depends: python{python}, libc6 (>= 2.28), libstdc++6, init-system-helpers (>= 1.54~), systemd
Recommends: ca-certificates, e2fsprogs, systemd-timesyncd | time-daemon
Section: science
Priority: optional
Description: fine-tunes foundation models on this board, as one of a fleet
 The device side of Fleetune for
 {system}.
 An agent trains on data that never leaves the board, and sends what it
 learned to an aggregator over MQTT.
 A unit runs at the first boot: it takes the board's seed, enrols it, looks at
 the board and measures what training costs there.
"""

_POSTINST = """\
#!/bin/sh
set -e

unit=fleetune-firstboot.service

if [ "$1" = configure ] || [ "$1" = abort-upgrade ] || [ "$1" = abort-deconfigure ] || [ "$1" = abort-remove ]; then
    systemd-sysusers fleetune.conf
    systemd-tmpfiles --create fleetune.conf
    deb-systemd-helper unmask "$unit" >/dev/null || true
    if deb-systemd-helper --quiet was-enabled "$unit"; then
        deb-systemd-helper enable "$unit" >/dev/null || true
    else
        deb-systemd-helper update-state "$unit" >/dev/null || true
    fi
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload >/dev/null || true
        # An agent goes on with the new kit. A board that is not provisioned yet is so at its next boot.
        deb-systemd-invoke restart fleetune-agent.service >/dev/null 2>&1 || true
    fi
fi
"""

_PRERM = """\
#!/bin/sh
set -e

if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop fleetune-agent.service fleetune-firstboot.service || true
fi
"""

_POSTRM = """\
#!/bin/sh
set -e

if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload >/dev/null || true
fi
if [ "$1" = purge ]; then
    deb-systemd-helper purge fleetune-firstboot.service >/dev/null || true
    rm -rf /var/lib/fleetune /var/cache/fleetune
    rm -rf /etc/systemd/system/fleetune-agent.service /etc/systemd/system/fleetune-agent.service.d
fi
"""

_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: Fleetune
Comment: The wheels of other projects that the package holds have licences of
 their own: each lies in its *.dist-info below /usr/lib/fleetune, and
 /usr/share/doc/fleetune/sbom.cdx.json names all of them.

Files: *
Copyright: 2026 The Fleetune authors
License: Apache-2.0
 On Debian systems, the full text of the licence is in
 /usr/share/common-licenses/Apache-2.0.
"""

_CHANGELOG = """\
fleetune ({version}) unstable; urgency=medium

  * See CHANGELOG.md of Fleetune.

 -- {maintainer}  {date}
"""

_OVERRIDES = """\
# The wheels are the files that a lock file pins by hash: none of them is altered, stripped or built anew.
fleetune: embedded-library *
fleetune: hardening-no-bindnow *
fleetune: hardening-no-fortify-functions *
fleetune: library-not-linked-against-libc *
fleetune: shared-library-lacks-prerequisites *
fleetune: unstripped-binary-or-object *
fleetune: unusual-interpreter *
fleetune: script-not-executable *
# A kit is the same below /usr/lib/fleetune and, when it came as an update, below /var/lib/fleetune.
fleetune: absolute-symlink-in-top-level-folder *
# fleetune --help, and the --help of each command.
fleetune: no-manual-page *
"""


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
    program = shutil.which("dpkg-deb")
    if program is None:
        raise ConfigError("a Debian package needs dpkg-deb", "install dpkg, 1.21 or newer")
    root = scratch / "deb"
    shutil.copytree(content.root, root, symlinks=True, copy_function=os.link)
    version = f"{content.version}+{content.tier.name}"
    said = {"version": version, "maintainer": maintainer, "date": formatdate(EPOCH)}
    docs = root / "usr/share/doc/fleetune"
    docs.mkdir(parents=True)
    (docs / "copyright").write_text(_COPYRIGHT, encoding="utf-8")
    (docs / "sbom.cdx.json").write_text(sbom, encoding="utf-8")
    (docs / "changelog.gz").write_bytes(gzip.compress(_CHANGELOG.format(**said).encode(), 9, mtime=EPOCH))
    overrides = root / "usr/share/lintian/overrides/fleetune"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(_OVERRIDES, encoding="utf-8")
    control = root / "DEBIAN"
    kib = sum(-(-path.lstat().st_size // 1024) for path in walk(root))
    sums = "".join(
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(root).as_posix()}\n"
        for path in walk(root)
        if path.is_file() and not path.is_symlink()
    )
    control.mkdir()
    (control / "control").write_text(
        _CONTROL.format(**said, kib=kib, python=content.tier.minor, system=content.tier.system), encoding="utf-8"
    )
    (control / "md5sums").write_text(sums, encoding="utf-8")
    for name, script in (("postinst", _POSTINST), ("prerm", _PRERM), ("postrm", _POSTRM)):
        (control / name).write_text(script, encoding="utf-8")
        (control / name).chmod(0o755)
    for path in (*docs.iterdir(), overrides, *control.iterdir()):
        path.chmod(0o755 if path.parent == control and path.name in ("postinst", "prerm", "postrm") else 0o644)
    for path in walk(root):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    # One thread: how many there are shows in what xz writes. Its higher levels take minutes for a tenth.
    command = [program, "--root-owner-group", "-Zxz", "-z1", "--threads-max=1", "--build", str(root), str(file)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(EPOCH)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(root)
    if done.returncode:
        raise RunFailedError(
            f"dpkg-deb failed: {done.stderr.strip()[-300:]}",
            "see that the disk has room, and that dpkg is 1.21 or newer",
        )
