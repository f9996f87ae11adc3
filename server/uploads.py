"""Updates on their way up: their manifests, and the chunks that came so far."""

from __future__ import annotations

from collections.abc import Iterator

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.messages import Missing, UpdateManifest


class Uploads:
    """The updates of one round that are not complete yet."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], tuple[UpdateManifest, chunks.Assembly]] = {}

    def begin(self, manifest: UpdateManifest) -> None:
        """Expect the chunks of an update; announced again it goes on, with other tensors it starts over.

        Raises:
            MessageError: The announced sizes exceed the limits.
        """
        assert manifest.payload is not None
        key = manifest.device, manifest.update
        if key not in self._open or self._open[key][0].payload != manifest.payload:
            self._open[key] = manifest, chunks.Assembly(manifest.payload)

    def add(self, device: str, update: str, index: int, data: bytes) -> tuple[UpdateManifest, bytes] | None:
        """Take a chunk; returns manifest and tensors when it was the last one.

        Raises:
            MessageError: The chunk does not fit, or the whole has another hash; then all is asked for again.
        """
        if (device, update) not in self._open:
            return None  # a copy of a chunk that is here already, or one whose manifest was refused
        manifest, assembly = self._open[device, update]
        assembly.add(index, data)
        if assembly.missing:
            return None
        whole = assembly.finish()
        del self._open[device, update]
        return manifest, whole

    def overdue(self) -> Iterator[tuple[str, Missing]]:
        """Devices, and the chunks that are to be asked of them."""
        for (device, update), (_, assembly) in self._open.items():
            if assembly.overdue():
                yield device, Missing(update=update, bitmap=assembly.missing_bitmap())

    def drop(self, device: str, update: str) -> None:
        """Let go of an update that was refused."""
        self._open.pop((device, update), None)

    def clear(self) -> None:
        """Let go of all: the round is closed."""
        self._open.clear()
