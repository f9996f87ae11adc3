"""The global tensors: what the aggregator has, and what it has told the devices.

Both are differences to the initial values, which follow from the job's seed. What is told is encoded, and a device has
what it decodes: so the next broadcast carries the difference between what there is and what devices have, and nothing
that a coarse codec loses is lost for good.

Everything here follows from the journal and the updates beside it; a checkpoint is where a restart begins to repeat it.
"""

from __future__ import annotations

import msgspec

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import EXACT, Codec, Tensors, add_differences
from fleetune.edge.protocol.messages import MAX_CHUNK, Payload, decode, encode

_Told = tuple[Tensors, set[str], Payload | None, dict[str, bytes]]


class _Head(msgspec.Struct, frozen=True):
    """First line of a checkpoint: what devices have not been told, and the bytes of what there is."""

    changed: list[str] = []
    size: int = 0


class Globals:
    """The global tensors of a job.

    Args:
        codec: How what is broadcast becomes bytes.
        checkpoint: What :meth:`checkpoint` returned earlier; nothing for a job that begins.

    Attributes:
        tensors: Full name → what there is.
        whole: What devices have, as a payload; absent before anything was told.
        payloads: Hash → bytes of what devices may ask for.

    Raises:
        MessageError: The checkpoint is damaged.
    """

    def __init__(self, codec: str, checkpoint: bytes = b"") -> None:
        self._codec = Codec.named(codec)
        head, _, tensors = checkpoint.partition(b"\n")
        kept = decode(head, _Head) if head else _Head()
        self.tensors: Tensors = EXACT.decode(tensors[: kept.size]) if head else {}
        self._told: Tensors = EXACT.decode(tensors[kept.size :]) if head else {}
        self._changed = set(kept.changed)
        self.whole: Payload | None = None
        self.payloads: dict[str, bytes] = {}
        if self._told:
            self._describe(EXACT.encode(self._told), MAX_CHUNK)

    def _describe(self, whole: bytes, chunk_size: int) -> None:
        self.whole = chunks.describe(whole, EXACT.name, chunk_size)
        self.payloads = {self.whole.sha256: whole}

    def checkpoint(self) -> bytes:
        """All of it, for a restart."""
        tensors = EXACT.encode(self.tensors)
        head = encode(_Head(sorted(self._changed), len(tensors)))
        return head + b"\n" + tensors + EXACT.encode(self._told)

    def add(self, means: Tensors) -> None:
        """Add what a round has gained."""
        self.tensors = add_differences(self.tensors, means)
        self._changed = self._changed | set(means)

    def told(self) -> _Told:
        """What devices have by now, for :meth:`untell`."""
        return self._told, self._changed, self.whole, self.payloads

    def untell(self, told: _Told) -> None:
        """It was not told after all."""
        self._told, self._changed, self.whole, self.payloads = told

    def tell(self, prefixes: tuple[str, ...], chunk_size: int = MAX_CHUNK) -> tuple[str | None, Payload | None]:
        """Encode what has changed in the tensors with these prefixes; devices have it from now on.

        Returns:
            Hash of the tensors that the changes are added to, and the changes; nothing if there are none.
        """
        names = sorted(name for name in self._changed if name.startswith(prefixes)) if prefixes else []
        if not names:
            return None, None
        told, since = self._told, self.whole.sha256 if self.whole is not None else None
        differences = {name: self.tensors[name] - told[name] if name in told else self.tensors[name] for name in names}
        changes = self._codec.encode(differences)
        self._told, self._changed = add_differences(told, self._codec.decode(changes)), self._changed - set(names)
        self._describe(EXACT.encode(self._told), chunk_size)
        described = chunks.describe(changes, self._codec.name, chunk_size)
        self.payloads[described.sha256] = changes
        return since, described
