"""Opens a pack and checks that it is whole."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleetune.edge.pack.manifest import FILE, MAX_EXTRACTOR, SCHEMA, WEIGHTS_FILE, Manifest
from fleetune.edge.pack.weights import Weights
from fleetune.edge.protocol.errors import UNDECODABLE, PackError
from fleetune.edge.protocol.files import file_sha256, read_bytes
from fleetune.edge.protocol.messages import Word

_MAX_MANIFEST = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


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
        raw = read_bytes(file, _MAX_MANIFEST)
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
        if (why := _contradiction(manifest)) is not None:
            raise PackError(f"{file}: {why}", "write the pack again")
        vocabulary = (manifest.text.vocabulary,) if manifest.text else ()
        for name in (WEIGHTS_FILE, *(f"{stem}.onnx" for stem in manifest.graphs), *vocabulary):
            if name not in manifest.files:
                raise PackError(f"{file} lists no {name}", "write the pack again")
        pack = cls(path, manifest, hashlib.sha256(raw).hexdigest())
        pack._check_files(hash_them=verify)
        return pack

    def _check_files(self, *, hash_them: bool) -> None:
        for name, expected in self.manifest.files.items():
            if not _NAME.fullmatch(name):
                raise PackError(
                    f"{self.path / FILE} lists {name[:80]!r}, which lies outside the pack or has an odd name",
                    "write the pack again",
                )
            file = self.path / name
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


def _contradiction(manifest: Manifest) -> str | None:
    """What of a manifest cannot be true beside the rest of it."""
    if (manifest.text is None) == (manifest.image is None):
        return "it takes text or pictures, and one of them"
    if manifest.image is not None and manifest.image.size % manifest.image.patch:
        return f"field image.size: {manifest.image.size} is no multiple of the patch, {manifest.image.patch}"
    if (shared := manifest.extractor) is not None:
        if (shared.kind == "dan") != (manifest.text is not None):
            return f"field extractor.kind: {shared.kind} does not fit {'text' if manifest.text else 'pictures'}"
        if (values := sum(map(math.prod, shared.shapes.values()))) > MAX_EXTRACTOR:
            return f"field extractor.shapes: {values} values in all, the most is {MAX_EXTRACTOR}"
        for name in shared.shapes:
            stem, _, what = name.rpartition(".")
            if (
                not stem.startswith("extractor.")
                or what not in ("weight", "bias")
                or f"{stem}.weight" not in shared.shapes
            ):
                return f"field extractor.shapes: {name} is not a tensor of an extractor"
    return None


class _Version(msgspec.Struct, frozen=True):
    schema: int
    kit: Word = ""
