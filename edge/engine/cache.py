"""The prefix cache: hidden states at a boundary, computed once for each sample and read back from disk.

Entries are found by content: the pack, the data file, the boundary, the adapters below it and the codec. An entry at
a higher boundary is computed from the highest matching entry below it, so a round pays only for the blocks whose
adapters changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from fleetune.edge.engine.backbone import Backbone
from fleetune.edge.engine.dataset import Dataset
from fleetune.edge.engine.entry import SCHEMA, Entry, StoredPrefix, what_is_wrong, write_entry
from fleetune.edge.engine.expert import Expert
from fleetune.edge.engine.prefix import ComputedPrefix, Prefix
from fleetune.edge.engine.tokens import CodecName
from fleetune.edge.protocol.files import is_full, sync_folder

log = logging.getLogger(__name__)

CacheCodec = CodecName | Literal["none"]
"""How hidden states are stored; ``none``: they are not."""

RESERVE = 512 << 20
"""Bytes of the disk that the cache leaves free, whatever its limit."""

_SCRATCH = ".new-"
_KEEP_COMPUTED = 2


def room(folder: Path) -> int:
    """Bytes that a cache in ``folder`` may take: what it has and what is free on the disk, less :data:`RESERVE`."""
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    return max(0, free + sum(map(_size, _entries(folder))) - RESERVE)


class PrefixCache:
    """Keeps :class:`Prefix` entries in a folder: as many of those used last as fit.

    Args:
        folder: Where entries live; created on demand.
        backbone: Computes them.
        dataset: The samples.
        micro_batch: Samples that go through a block at once.
        codec: How they are stored, or ``none`` to compute them for each batch.
        limit: Bytes that all entries together may take; None for what the disk has.

    Attributes:
        missing: Bytes that the entry which was asked for last lacked; 0 if it is on disk, or none was wanted there.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        dataset: Dataset,
        *,
        micro_batch: int,
        codec: CacheCodec = "f16",
        limit: int | None = None,
    ) -> None:
        self._folder, self._backbone, self._dataset = folder, backbone, dataset
        self._micro_batch, self._codec, self._limit = micro_batch, codec, limit
        self._stored: dict[Path, StoredPrefix] = {}  # hashed, or written, by this process
        self._computed: dict[str, ComputedPrefix] = {}
        self._warned = False
        self.missing = 0

    def prefix(self, boundary: int, expert: Expert) -> Prefix:
        """The hidden states at ``boundary`` under the adapters of ``expert`` below it.

        To make room for them, those of another boundary may go: let go of a prefix before you ask for the next.

        Raises:
            DataError: A hidden state is not finite; names the samples.
            OSError: The disk fails.
        """
        stored = None if self._codec == "none" else self._stored_prefix(self._codec, boundary, expert)
        return stored or self._computed_prefix(boundary, expert)

    def _key(self, boundary: int, expert: Expert) -> str:
        parts = (self._backbone.pack.sha256, self._dataset.sha256, boundary, expert.fingerprint_below(boundary))
        return hashlib.sha256(" ".join(map(str, (SCHEMA, self._codec, *parts))).encode()).hexdigest()

    def _computed_prefix(self, boundary: int, expert: Expert) -> ComputedPrefix:
        key = self._key(boundary, expert)
        if key not in self._computed:  # its means are kept, so that a gate does not pay for them again
            while len(self._computed) >= _KEEP_COMPUTED:
                del self._computed[next(iter(self._computed))]
            self._computed[key] = self._source(boundary, expert.copy())
        return self._computed[key]

    def _source(self, boundary: int, expert: Expert, below: Prefix | None = None) -> ComputedPrefix:
        return ComputedPrefix(
            self._backbone, self._dataset, expert, boundary, micro_batch=self._micro_batch, below=below
        )

    # --- entries on disk ----------------------------------------------------------------------------------------

    def _stored_prefix(self, codec: CodecName, boundary: int, expert: Expert) -> StoredPrefix | None:
        blank = self._blank(codec, boundary, expert)
        found = self._open(blank)
        if found is not None:
            self.missing = 0
            return found
        for left in self._folder.glob(f"{_SCRATCH}*"):  # by a process that was killed: a state folder has one agent
            shutil.rmtree(left)
        lower = (self._open(self._blank(codec, block, expert)) for block in range(boundary - 1, -1, -1))
        below = next((prefix for prefix in lower if prefix is not None), None)
        if not self._make_room(blank.size, keep=below.folder if below else None):
            return None
        if below is not None and below.folder not in self._stored:
            below = None
        return self._write(blank, self._source(boundary, expert, below))

    def _blank(self, codec: CodecName, boundary: int, expert: Expert) -> Entry:
        width = self._backbone.pack.manifest.width
        return Entry.blank(self._key(boundary, expert), codec, boundary, self._dataset.lengths, width)

    def _place(self, entry: Entry) -> Path:
        return self._folder / entry.key[:32]

    def _open(self, blank: Entry) -> StoredPrefix | None:
        folder = self._place(blank)
        if not folder.is_dir():
            self._stored.pop(folder, None)
            return None
        if folder not in self._stored:
            wrong = what_is_wrong(folder, blank)
            if wrong is not None:
                log.warning("the prefix cache's entry %s is damaged and computed again: %s", folder, wrong)
                shutil.rmtree(folder)
                return None
            self._stored[folder] = StoredPrefix(folder, blank, self._dataset.lengths)
        os.utime(folder)
        return self._stored[folder]

    def _make_room(self, size: int, keep: Path | None) -> bool:
        """Delete entries until ``size`` bytes fit, the least recently used first and ``keep`` last."""
        limit = room(self._folder)
        if self._limit is not None:
            limit = min(limit, self._limit)
        if size > limit:
            self._compute_instead(size, missing=size - limit)
            return False
        entries = sorted(_entries(self._folder), key=lambda entry: (entry == keep, entry.stat().st_mtime))
        taken = sum(map(_size, entries))
        for entry in entries:
            if taken + size <= limit:
                break
            taken -= _size(entry)
            self._stored.pop(entry, None)
            shutil.rmtree(entry)
        return True

    def _write(self, blank: Entry, source: ComputedPrefix) -> StoredPrefix | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._backbone.hold(range(0))  # the room of an earlier suffix's blocks is needed here
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
        try:
            write_entry(scratch, blank, source)
            folder = scratch.rename(self._place(blank))
            sync_folder(self._folder)
        except OSError as error:
            if not is_full(error):
                raise
            self._compute_instead(blank.size, missing=blank.size)  # somebody else took the room meanwhile
            return None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.missing = 0
        self._stored[folder] = StoredPrefix(folder, blank, self._dataset.lengths)
        return self._stored[folder]

    def _compute_instead(self, size: int, missing: int) -> None:
        self.missing = missing
        if not self._warned:
            self._warned = True
            log.warning(
                "the prefix cache in %s has no room: an entry takes %.2f MiB, %.2f MiB more than there is; "
                "the frozen blocks run again for every batch",
                *(self._folder, size / (1 << 20), missing / (1 << 20)),
            )


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")]


def _size(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())
