"""Updates on their way up: their manifests, and the chunks that came so far.

The aggregator asks for chunks, and of few devices at a time: neither its memory nor the broker's queue grows with the
fleet. A device that waits announces its update again every now and then.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.messages import Missing, UpdateManifest

_AT_ONCE = 8
"""Devices that may send many chunks at the same time."""

_STALLED = 10.0
"""Seconds without a chunk after which another device has its turn."""


@dataclass
class _Upload:
    manifest: UpdateManifest
    assembly: chunks.Assembly
    granted: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        return self.granted and self.assembly.payload.chunks > 1 and time.monotonic() - self.since < _STALLED


class Uploads:
    """The updates that are not complete yet: one for each device.

    Args:
        folder: For what has come of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploads: dict[str, _Upload] = {}

    def begin(self, manifest: UpdateManifest) -> None:
        """Expect the chunks of an update; announced again it goes on where it was.

        Raises:
            MessageError: The announced sizes exceed the limits.
            OSError: There is no room for them.
        """
        assert manifest.payload is not None
        known = self._uploads.get(manifest.device)
        if known is not None and known.manifest.payload == manifest.payload:
            known.manifest, known.granted = manifest, False
            return
        folder = self._folder / manifest.device
        assembly = chunks.Assembly(manifest.payload, folder)
        assembly.drop_others()  # of an update that never came to its end
        self._uploads[manifest.device] = _Upload(manifest, assembly)

    def grants(self) -> Iterator[tuple[str, Missing]]:
        """Devices whose turn it is, and the chunks that are to be asked of them."""
        free = _AT_ONCE - sum(upload.busy for upload in self._uploads.values())
        for device, upload in self._uploads.items():
            if upload.granted or (free <= 0 and upload.assembly.payload.chunks > 1):
                if not upload.busy:
                    upload.assembly.let_go()
                continue
            upload.granted, upload.since = True, time.monotonic()
            if upload.assembly.payload.chunks > 1:  # a single one follows its manifest
                free -= 1
                yield device, Missing(update=upload.manifest.update, bitmap=upload.assembly.missing_bitmap())

    def add(self, device: str, update: str, index: int, data: bytes) -> tuple[UpdateManifest, bytes] | None:
        """Take a chunk; returns manifest and tensors when it was the last one.

        Raises:
            MessageError: The chunk does not fit, or the whole has another hash; then all is asked for again.
            OSError: There is no room for it.
        """
        upload = self._uploads.get(device)
        if upload is None or upload.manifest.update != update:
            return None  # a copy of a chunk that is here already, or one whose manifest was refused
        upload.since = time.monotonic()
        upload.assembly.add(index, data)
        if not upload.assembly.complete:
            return None
        whole = upload.assembly.finish()
        del self._uploads[device]
        return upload.manifest, whole

    def drop(self, device: str, update: str) -> None:
        """Let go of an update that was refused."""
        upload = self._uploads.get(device)
        if upload is not None and upload.manifest.update == update:
            upload.assembly.drop()
            del self._uploads[device]

    def drop_all(self, device: str) -> None:
        """Let go of whatever a device sends."""
        if (upload := self._uploads.pop(device, None)) is not None:
            upload.assembly.drop()

    def clear(self) -> None:
        """Let go of all: the job is over."""
        self._uploads.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
