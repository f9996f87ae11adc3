"""A repository of releases, as The Update Framework has it: what of it is public is served by any web server.

Against whoever holds the server, or the way to it: an old release is not taken for a new one (rollback), the newest not
withheld for ever (freeze: the timestamp expires), parts of different releases not mixed, and nothing unsigned taken.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer
from tuf.repository import Repository

from fleetune.edge.protocol.errors import AuthorityError, ConfigError, KeyExposedError
from fleetune.edge.protocol.files import FolderLock, make_folder, read_bytes, write_atomic
from fleetune.edge.protocol.identity.folder import write_private
from fleetune.tools.documents import from_json, to_json
from fleetune.tools.release.rollout import FILE as ROLLOUT
from fleetune.tools.release.rollout import MAX_ROLLOUT, Rollout, read_rollout, write_rollout

PUBLIC, METADATA, TARGETS = Path("public"), Path("public/metadata"), Path("public/targets")
KEYS, SITE = Path("keys"), "releases.json"

_DAYS = {Root.type: 5 * 365, Targets.type: 365, Snapshot.type: 365, Timestamp.type: 30}
"""How long each role's metadata count; the shortest is how long a server may withhold what is new."""

_KINDS: dict[str, type[Any]] = {
    Root.type: Root,
    Targets.type: Targets,
    Snapshot.type: Snapshot,
    Timestamp.type: Timestamp,
}
_MAX_KEY, _MAX_METADATA = 1 << 14, 8 << 20
_PRETTY = JSONSerializer(compact=False, validate=True)


class _Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    url: str


class Releases(Repository):
    """One of them. Nobody else changes it as long as it is open.

    Args:
        folder: As :meth:`make` has made it.

    Attributes:
        folder: The same.

    Raises:
        AuthorityError: There is none.
        KeyExposedError: Others may read a key.
        RunFolderError: Another process changes it.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / METADATA / "1.root.json").is_file():
            raise AuthorityError(f"{folder} holds no releases", "make them: `fleetune release init`")
        self.folder = folder
        self._lock = FolderLock(folder, remedy="wait until that one is done")
        try:
            self._signers = {role: _signer(folder / KEYS / f"{role}.pem") for role in _KINDS}
        except BaseException:
            self._lock.close()
            raise

    @classmethod
    def make(cls, folder: Path, url: str) -> Releases:
        """Make a repository with keys of its own, in which nothing is published yet.

        Args:
            folder: Made if it is not there.
            url: Where ``public`` will be served.

        Raises:
            AuthorityError: There is one.
            ConfigError: The address is none.
        """
        if not re.fullmatch(r"https?://[^\s/]\S{0,300}", url):
            raise ConfigError(f"--url: {url} is no address of a web server", "such as https://updates.example.org/lab")
        if (folder / METADATA).exists() or (folder / KEYS).exists():
            raise AuthorityError(f"{folder} holds releases already", "use those, or name another folder")
        for part in (METADATA, TARGETS, KEYS):
            make_folder(folder / part)
        (folder / KEYS).chmod(0o700)
        for role in _KINDS:
            write_private(folder / KEYS / f"{role}.pem", CryptoSigner.generate_ed25519().private_bytes)
        site = _Site(1, url.rstrip("/"))
        write_atomic(folder / SITE, to_json(site))
        signers = {role: _signer(folder / KEYS / f"{role}.pem") for role in _KINDS}
        root = Root(expires=_expiry(Root.type), consistent_snapshot=True)
        for role, signer in signers.items():
            root.add_key(signer.public_key, role)
        metadata = Metadata(root)
        metadata.sign(signers[Root.type])
        write_atomic(folder / METADATA / "1.root.json", metadata.to_bytes(_PRETTY))
        releases = cls(folder)
        with releases.edit_targets():
            pass
        releases.do_snapshot()
        releases.do_timestamp()
        return releases

    def leave(self) -> None:
        """Let others change it."""
        self._lock.close()

    def __enter__(self) -> Releases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    @property
    def url(self) -> str:
        """Where what is public is served."""
        file, remedy = self.folder / SITE, 'write {"schema": 1, "url": "https://…"} into it'
        if not file.is_file():
            raise ConfigError(f"{file} is missing", remedy)
        return from_json(read_bytes(file, _MAX_KEY), _Site, str(file), remedy).url

    def rollouts(self) -> Iterator[Rollout]:
        """All that were published, the newest first."""
        for version in range(self.targets().version, 0, -1):
            file = self.folder / METADATA / f"{version}.targets.json"
            targets = Metadata[Targets].from_bytes(read_bytes(file, _MAX_METADATA)).signed
            if target := targets.targets.get(ROLLOUT):
                place = self.folder / TARGETS / f"{target.hashes['sha256']}.{ROLLOUT}"
                yield read_rollout(read_bytes(place, MAX_ROLLOUT), str(place))

    @property
    def root_file(self) -> bytes:
        """The newest root metadata: whom devices believe."""
        return self._newest(Root.type)[0]

    @property
    def rollout(self) -> Rollout | None:
        """The newest rollout; None before the first."""
        return next(self.rollouts(), None)

    def publish(self, rollout: Rollout, archives: Mapping[str, Path]) -> None:
        """Let devices have a rollout.

        Args:
            rollout: To whom goes what.
            archives: Name of a target → its file, for those that are not there yet.

        Raises:
            ConfigError: A name in it is not valid.
            AuthorityError: An archive is missing.
            OSError: There is no room.
        """
        held = self.targets().targets
        wanted = {part.target for part in (*rollout.kits.values(), *rollout.packs.values())}
        if missing := wanted - archives.keys() - held.keys():
            raise AuthorityError(f"the archive of {', '.join(sorted(missing))} is missing", "publish the build again")
        infos = {name: TargetFile.from_file(name, str(file), ["sha256"]) for name, file in archives.items()}
        raw = write_rollout(rollout)
        read_rollout(raw, ROLLOUT)  # what no board would read is not published
        infos[ROLLOUT] = TargetFile.from_data(ROLLOUT, raw, ["sha256"])
        for name, info in infos.items():  # what metadata name is there before they name it
            place = self.folder / TARGETS / f"{info.hashes['sha256']}.{name}"
            if place.is_file():
                continue
            if name == ROLLOUT:
                write_atomic(place, raw)
            else:
                scratch = place.with_name(f".{place.name}")
                shutil.copyfile(archives[name], scratch)
                scratch.replace(place)
        with self.edit_targets() as targets:
            targets.targets.update(infos)
        self.do_snapshot()
        self.do_timestamp()

    def renew(self) -> None:
        """Sign anew that what is there is the newest."""
        self.do_snapshot()
        self.do_timestamp(force=True)

    @property
    def fresh_until(self) -> datetime:
        """When devices stop to believe that they see the newest, unless it is signed anew."""
        return self.timestamp().expires

    # --- what python-tuf asks for --------------------------------------------------------------------------------

    def open(self, role: str) -> Metadata[Any]:
        """The newest metadata of a role; empty ones before the first."""
        raw, version = self._newest(role)
        if not version:
            empty = _KINDS[role](expires=_expiry(role))
            empty.version = 0
            return Metadata(empty)
        return Metadata.from_bytes(raw)

    def close(self, role: str, md: Metadata[Any]) -> None:
        """Sign and write the next version."""
        md.signed.version += 1
        md.signed.expires = _expiry(role)
        md.sign(self._signers[role])
        name = f"{role}.json" if role == Timestamp.type else f"{md.signed.version}.{role}.json"
        write_atomic(self.folder / METADATA / name, md.to_bytes(_PRETTY))

    @property
    def targets_infos(self) -> dict[str, MetaFile]:
        """Version of the targets' metadata."""
        return {"targets.json": MetaFile(self.targets().version)}

    @property
    def snapshot_info(self) -> MetaFile:
        """Version of the snapshot."""
        return MetaFile(self.snapshot().version)

    def _newest(self, role: str) -> tuple[bytes, int]:
        """Newest metadata of a role and their version, which is 0 where there are none."""
        folder = self.folder / METADATA
        if role == Timestamp.type:
            file = folder / f"{role}.json"
            return (read_bytes(file, _MAX_METADATA), 1) if file.is_file() else (b"", 0)
        versions = [int(file.name.partition(".")[0]) for file in folder.glob(f"[1-9]*.{role}.json")]
        if not versions:
            return b"", 0
        return read_bytes(folder / f"{max(versions)}.{role}.json", _MAX_METADATA), max(versions)


def _signer(file: Path) -> CryptoSigner:
    if file.stat().st_mode & 0o077:
        raise KeyExposedError(f"{file} may be read by others", f"chmod 600 {file}")
    return CryptoSigner(load_pem_private_key(read_bytes(file, _MAX_KEY), None))


def _expiry(role: str) -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=_DAYS[role])
