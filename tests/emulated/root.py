"""Debian's Python for arm64, unpacked into the cache. Needs neither root nor an emulator: nothing in it is run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from fleetune.edge.protocol.errors import FleetuneError
from fleetune.tools.assets.fetch import cache_root
from fleetune.tools.emulator.image import debian_archive
from fleetune.tools.staging import fill, staged
from support.lacking import lacking

RELEASE = "bookworm"
PACKAGES = ("python3.11", "libstdc++6")
GLIBC = (2, 35)
"""What a rebuilt Nano has (Ubuntu 22.04); wheels for a newer one are not taken. Debian 12 itself has 2.36."""

PYTHON = Path("usr/bin/emulated-python3.11")

_LAUNCHER = """\
#!/bin/sh
# Being sys.executable, it starts children in the emulator too, whether or not the kernel knows what to do with arm64.
root=${0%/usr/bin/*}
exec qemu-aarch64-static -L "$root" -0 "$0" "$root/usr/bin/python3.11" "$@"
"""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_APT = """\
Dir "{folder}";
Dir::State::status "{folder}/status";
Dir::Etc::sourceparts "-";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
"""


def debian_root() -> Path:
    """The root, from the cache or else from a Debian archive; the packages are verified by apt."""
    content = "\n".join([RELEASE, *PACKAGES, _LAUNCHER])
    base = cache_root() / "arm64"
    folder = base / f"debian-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with staged(base) as scratch:
            root = scratch / "root"
            for package in _download(scratch):
                _run(["dpkg-deb", "--extract", str(package), str(root)])
            (root / PYTHON).write_text(_LAUNCHER)
            (root / PYTHON).chmod(0o755)
            fill(root, folder)
    return folder


def _download(scratch: Path) -> list[Path]:
    """The packages and all that they depend on."""
    if not _KEYRING.is_file():
        lacking("needs debian-archive-keyring: apt-get install debian-archive-keyring")
    apt = scratch / "apt"
    for folder in ("etc/apt/preferences.d", "etc/apt/trusted.gpg.d", "var/lib/apt/lists/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "var/cache/apt/archives/partial").mkdir(parents=True)
    (apt / "status").touch()
    (apt / "etc/apt/sources.list").write_text(f"deb [signed-by={_KEYRING}] {_archive()} {RELEASE} main\n")
    config = apt / "apt.conf"
    config.write_text(_APT.format(folder=apt))
    _run(["apt-get", "--quiet=2", "update"], APT_CONFIG=str(config))
    _run(["apt-get", "--quiet=2", "--yes", "--download-only", "install", *PACKAGES], APT_CONFIG=str(config))
    return sorted((apt / "var/cache/apt/archives").glob("*.deb"))


def _archive() -> str:
    try:
        return debian_archive()
    except FleetuneError as error:
        lacking(f"needs a Debian archive: {error.remedy}")


def _run(command: list[str], **environment: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        lacking(f"needs {command[0]}, which Debian and Ubuntu have")
    done = subprocess.run(
        [program, *command[1:]], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        lacking(f"needs a Debian archive: {' '.join(command)}: {said[0]}")
    return done.stdout
