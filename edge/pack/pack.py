"""Opens a pack and checks that it is whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.pack.manifest import FILE, SCHEMA, WEIGHTS_FILE, Manifest
from fleetune.edge.pack.weights import Weights
from fleetune.edge.protocol.errors import UNDECODABLE, PackError

_MAX_MANIFEST = 1 << 20


@dataclass(frozen=True)
class Pack:
    """A backbone that is ready to run.

    Attributes:
        path: The pack's folder.
        manifest: Its table of contents.
        sha256: Hash of the manifest, which holds the hash of every other file: the pack's identity.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Pack:
        """Open the pack in ``path``.

        Args:
            path: The pack's folder.
            verify: Whether to hash every file (12 MB for MiniLM) or only to compare sizes.

        Raises:
            PackError: A file is missing or altered, or the pack is made for another version of Fleetune.
        """
        file = path / FILE
        if not file.is_file():
            raise PackError(
                f"{path} is not a pack: it has no {FILE}", "make one with `fleetune pack BACKBONE --out DIR`"
            )
        if file.stat().st_size > _MAX_MANIFEST:
            raise PackError(f"{file} is larger than {_MAX_MANIFEST} bytes", "write the pack again")
        raw = file.read_bytes()
        try:
            version = msgspec.json.decode(raw, type=_Version)
            if version.schema != SCHEMA:
                raise PackError(
                    f"{file}: the pack has schema {version.schema} (written by Fleetune {version.kit or 'unknown'}), "
                    f"this Fleetune reads schema {SCHEMA}",
                    f"use Fleetune {version.kit or 'in a newer version'}, or pack the backbone again",
                )
            manifest = msgspec.json.decode(raw, type=Manifest)
        except UNDECODABLE as error:
            raise PackError(f"{file}: {error}", "write the pack again") from error
        vocabulary = (manifest.text.vocabulary,) if manifest.text else ()
        for name in (WEIGHTS_FILE, *(f"{stem}.onnx" for stem in manifest.graphs), *vocabulary):
            if name not in manifest.files:
                raise PackError(f"{file} lists no {name}", "write the pack again")
        pack = cls(path, manifest, hashlib.sha256(raw).hexdigest())
        pack._check_files(hash_them=verify)
        return pack

    def _check_files(self, *, hash_them: bool) -> None:
        for name, expected in self.manifest.files.items():
            file = self.path / name
            if Path(name).name != name:
                raise PackError(
                    f"{self.path / FILE} lists {name!r}, which lies outside the pack", "write the pack again"
                )
            if not file.is_file():
                raise PackError(f"{file} is missing", "copy the pack again, or write it again")
            size = file.stat().st_size
            found = file_sha256(file) if hash_them and size == expected.bytes else expected.sha256
            if size != expected.bytes or found != expected.sha256:
                what = f"{size} bytes instead of {expected.bytes}" if size != expected.bytes else f"SHA-256 {found}"
                raise PackError(
                    f"{file} is not the file that was packed: it has {what}, expected SHA-256 {expected.sha256}",
                    "copy the pack again, or write it again",
                )

    def weights(self) -> Weights:
        """Map the weights."""
        return Weights(self.path / WEIGHTS_FILE, self.manifest)

    def graph(self, stem: str) -> Path:
        """Path of a graph."""
        return self.path / f"{stem}.onnx"

    def weights_sha256(self) -> str:
        """Hash the quantised weights as they are on disk now."""
        return file_sha256(self.path / WEIGHTS_FILE)


class _Version(msgspec.Struct, frozen=True):
    schema: int
    kit: str = ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
