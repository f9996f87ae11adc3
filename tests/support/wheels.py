"""Wheels in folders of their own, in the cache: another version of a package, or what another machine installs."""

from __future__ import annotations

import configparser
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

from fleetune.tools.assets.fetch import cache_root
from fleetune.tools.staging import fill, staged
from support.lacking import lacking

ROOT = Path(__file__).parents[2]


def plain_install() -> dict[str, Requirement]:
    """What a device needs: name → requirement, as ``setup.cfg`` has it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = [Requirement(line) for line in setup["options"]["install_requires"].splitlines() if line]
    return {requirement.name: requirement for requirement in wanted}


def pins(**environment: str) -> dict[str, str]:
    """Name → version that ``constraints.txt`` pins for this Python, or where other markers hold."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line]
    return {r.name: str(r.specifier)[2:] for r in pinned if r.marker is None or r.marker.evaluate(environment)}


def wheels(name: str, wanted: list[str], *options: str, pinned: Mapping[str, str]) -> Path:
    """A folder with some packages and all that they pull in: from the cache, or else installed by pip.

    Args:
        name: What the folder's name starts with.
        wanted: The packages.
        options: More options for ``pip install``.
        pinned: Name → version, for what is pulled in as well.
    """
    constraints = "".join(f"{package}=={version}\n" for package, version in sorted(pinned.items()))
    content = "\n".join([sys.version, *wanted, *options, constraints])
    root = cache_root() / "wheels"
    folder = root / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with staged(root) as scratch:
            (scratch / "constraints.txt").write_text(constraints)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
            command += ["--only-binary=:all:", "--constraint", str(scratch / "constraints.txt")]
            command += ["--target", str(scratch / "files"), *options, *wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["ERROR: no reason"]
                lacking(f"needs a package registry: pip cannot install {', '.join(wanted)}: {said[0]}")
            fill(scratch / "files", folder)
    return folder
