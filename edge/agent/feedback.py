"""Error feedback: what a codec loses in one round is added to the next.

1-bit SGD (Seide et al., 2014) brought it, and Karimireddy et al. (2019) showed that with it compressed updates reach
what exact ones do: an update u is sent as c = C(u + e), and e becomes u + e − c.
"""

from __future__ import annotations

import re

from fleetune.edge.agent.state import JobStore
from fleetune.edge.protocol.codec import Codec, Tensors

_FILE = re.compile(r"lost-([0-9]+)\.safetensors")


class Feedback:
    """What the updates of a job have lost so far; it counts from the moment when its update is in the outbox.

    Args:
        store: Of the job.
        codec: How tensors become bytes.
    """

    def __init__(self, store: JobStore, codec: Codec) -> None:
        self._store, self._codec = store, codec

    def encode(self, tensors: Tensors, *, version: int, answered: int) -> bytes:
        """Encode an update, together with what the one before has lost, and keep what is lost now.

        Args:
            tensors: The update.
            version: The announcement that it answers.
            answered: The newest one whose answer reached the outbox: what was kept after that does not count.

        Raises:
            MessageError: A value is not finite, or too large for the codec.
        """
        if self._codec.exact:
            return self._codec.encode(tensors)
        kept = sorted(number for number in self._versions() if number <= answered)
        lost = (self._store.load(_name(kept[-1])) if kept else None) or {}
        wanted = {name: tensor + lost[name] if name in lost else tensor for name, tensor in tensors.items()}
        data = self._codec.encode(wanted)
        arrived = self._codec.decode(data)
        self._store.save(_name(version), lost | {name: tensor - arrived[name] for name, tensor in wanted.items()})
        for old in kept[:-1]:
            (self._store.folder / f"{_name(old)}.safetensors").unlink()
        return data

    def _versions(self) -> list[int]:
        names = (_FILE.fullmatch(file.name) for file in self._store.folder.glob("lost-*"))
        return [int(name[1]) for name in names if name is not None]


def _name(version: int) -> str:
    return f"lost-{version}"
