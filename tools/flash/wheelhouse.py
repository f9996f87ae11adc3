"""The wheels of a tier: fetched by pip, chosen by hash, kept in the cache."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from fleetune.edge.protocol.errors import AssetError
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.assets.fetch import cache_root
from fleetune.tools.flash.lockfile import Pin
from fleetune.tools.flash.tier import Tier
from fleetune.tools.staging import fill, staged


@dataclass(frozen=True)
class Wheel:
    """A wheel.

    Attributes:
        file: Where it is.
        name: Of its package, in lower case.
        version: Of its package.
        sha256: Of its bytes.
    """

    file: Path
    name: str
    version: str
    sha256: str


def fetch_wheels(
    tier: Tier, pins: Mapping[str, Pin], own: Iterable[Path] = (), cache: Path | None = None
) -> list[Wheel]:
    """The wheels of a tier, by name.

    Args:
        tier: What they must run on.
        pins: What is wanted.
        own: Wheels of one's own, each in place of the pinned one of the same name: such as NVIDIA's ``onnxruntime-gpu``
            in place of ``onnxruntime``.
        cache: The cache's folder, if not the usual one. Files in it are hashed anew every time.

    Raises:
        AssetError: No registry has one of them, or a file is not the one that was pinned.
        OSError: The cache cannot be written.
    """
    given = [_read_own(file) for file in own]
    replaced = {_replaces(wheel.name) for wheel in given}
    wanted = {name: pin for name, pin in pins.items() if name not in replaced}
    lines = [
        f"{pin.name}=={pin.version} {' '.join(f'--hash=sha256:{digest}' for digest in sorted(pin.hashes))}\n"
        for pin in wanted.values()
    ]
    digest = hashlib.sha256("".join([*tier.platforms, tier.minor, *lines]).encode()).hexdigest()
    root = (cache or cache_root()) / "wheelhouse"
    folder = root / f"{tier.name}-{digest[:12]}"
    if not folder.is_dir():
        with staged(root) as scratch:
            _download(tier, lines, scratch)
            fill(scratch / "wheels", folder)
    found = [_checked(wheel, wanted, folder) for wheel in map(_read, sorted(folder.glob("*.whl")))]
    if missing := wanted.keys() - {wheel.name for wheel in found}:
        raise AssetError(
            f"{folder} lacks {', '.join(sorted(missing))}", "remove that folder; the next run fetches it anew"
        )
    return sorted(found + given, key=lambda wheel: wheel.name)


def install_wheels(tier: Tier, wheels: Iterable[Wheel], site: Path) -> None:
    """Unpack wheels as pip does, for another processor and another Python; no code of theirs runs.

    Args:
        tier: What they run on.
        wheels: All that is wanted.
        site: The folder to fill, ``site-packages``.

    Raises:
        AssetError: One of them is none, or does not run there.
    """
    command = [*_pip("install"), "--target", str(site), "--no-deps", "--no-compile", "--no-index", *_target(tier)]
    command.append("--ignore-requires-python")  # it would hold them against the Python that runs it
    _run([*command, *(str(wheel.file) for wheel in wheels)], "take a wheel for this tier")


def _download(tier: Tier, lines: Iterable[str], scratch: Path) -> None:
    pins = scratch / "pins.txt"
    pins.write_text("".join(lines), encoding="utf-8")
    command = [*_pip("download"), "--dest", str(scratch / "wheels"), "--no-deps", "--require-hashes", *_target(tier)]
    _run(
        [*command, "--requirement", str(pins)],
        "check this machine's package registry (pip config list), or run it once where there is one",
    )


def _pip(verb: str) -> list[str]:
    return [sys.executable, "-m", "pip", verb, "--quiet", "--no-input", "--disable-pip-version-check"]


def _target(tier: Tier) -> list[str]:
    tags = [f"--platform={tag}" for tag in tier.platforms]
    return ["--only-binary=:all:", "--implementation=cp", f"--python-version={tier.minor}", *tags]


def _run(command: list[str], remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE) or [done.stderr.strip()[-300:]]
        raise AssetError(f"pip cannot {command[3]} the device's wheels: {said[-1]}", remedy)


def _read(file: Path) -> Wheel:
    try:
        name, version, _build, _tags = parse_wheel_filename(file.name)
    except InvalidWheelFilename as error:
        raise AssetError(f"{file}: {error}", "name a wheel as its maker named it") from error
    return Wheel(file, name, str(version), file_sha256(file))


def _read_own(file: Path) -> Wheel:
    if not file.is_file():
        raise AssetError(f"{file} is not there", "name a wheel (*.whl)")
    return _read(file)


def _replaces(name: str) -> str:
    return "onnxruntime" if name == "onnxruntime-gpu" else name


def _checked(wheel: Wheel, wanted: Mapping[str, Pin], folder: Path) -> Wheel:
    pin = wanted.get(wheel.name)
    if pin is None or wheel.sha256 not in pin.hashes:
        raise AssetError(
            f"{wheel.file} is not what was pinned: its SHA-256 is {wheel.sha256}",
            f"remove {folder}; the next run fetches it anew",
        )
    return wheel
