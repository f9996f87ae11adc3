"""Error feedback: what a codec loses in one round is added to the next.

1-bit SGD (Seide et al., 2014) brought it, and Karimireddy et al. (2019) showed that with it compressed updates reach
what exact ones do: an update u is sent as c = C(u + e), and e becomes u + e − c.
"""

from __future__ import annotations

from fleetune.edge.protocol.codec import Codec, Tensors, shapes_of


def encode_with_feedback(tensors: Tensors, lost: Tensors, codec: Codec) -> tuple[bytes, Tensors]:
    """Encode an update, together with what the ones before have lost.

    Args:
        tensors: The update u.
        lost: What those before it have lost, e; of tensors that are not in this one it waits for the next.
        codec: How tensors become bytes, C.

    Returns:
        The bytes of c, and the new e: nothing if the codec loses nothing.

    Raises:
        MessageError: A value is not finite, or too large for the codec.
    """
    if codec.exact:
        return codec.encode(tensors), {}
    wanted = {name: tensor + lost[name] if name in lost else tensor for name, tensor in tensors.items()}
    data = codec.encode(wanted)
    arrived = codec.decode(data, shapes_of(wanted))
    return data, lost | {name: tensor - arrived[name] for name, tensor in wanted.items()}
