"""The global tensors: what the aggregator has, and what it has told the devices.

Both are differences to the initial values, which follow from the job's seed. What is told is encoded, and a device has
what it decodes: so the next broadcast carries the difference between what there is and what devices have, and nothing
that a coarse codec loses is lost for good.

Everything here follows from the journal and the updates beside it; a checkpoint is where a restart begins to repeat it.
"""

from __future__ import annotations

import msgspec

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import EXACT, Codec, Tensors, add_differences, read_exact, shapes_of
from fleetune.edge.protocol.errors import UNDECODABLE, MessageError
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_PAYLOAD, Count, Payload, encode

_MAX_HEAD = 4 << 20

MAX_CHECKPOINT = _MAX_HEAD + 2 * MAX_PAYLOAD
"""Largest checkpoint in bytes: what there is, and what devices have, each no larger than what may travel."""

_Told = tuple[Tensors, set[str], Payload | None, dict[str, bytes]]


class _Head(msgspec.Struct, frozen=True):
    """First line of a checkpoint: what devices have not been told, and the bytes of what there is."""

    changed: list[str] = []
    size: Count = 0


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
        self.tensors, self._told, self._changed = _read(checkpoint) if checkpoint else ({}, {}, set[str]())
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
        told = add_differences(told, self._codec.decode(changes, shapes_of(differences)))
        self._told, self._changed = told, self._changed - set(names)
        self._describe(EXACT.encode(self._told), chunk_size)
        described = chunks.describe(changes, self._codec.name, chunk_size)
        self.payloads[described.sha256] = changes
        return since, described


def _read(checkpoint: bytes) -> tuple[Tensors, Tensors, set[str]]:
    """What there is, what devices have, and the names of what they have not been told."""
    end = checkpoint.find(b"\n", 0, _MAX_HEAD)
    try:
        head = msgspec.json.decode(checkpoint[: max(end, 0)], type=_Head)
    except UNDECODABLE as error:
        raise MessageError(f"no checkpoint: {error}", "restore it from a backup", reason="malformed") from error
    middle = end + 1 + head.size
    tensors, told = read_exact(checkpoint[end + 1 : middle]), read_exact(checkpoint[middle:])
    shapes = shapes_of(tensors)
    if not shapes_of(told).items() <= shapes.items() or not set(head.changed) <= shapes.keys():
        raise MessageError("no checkpoint: its parts do not fit", "restore it from a backup", reason="malformed")
    return tensors, told, set(head.changed)
