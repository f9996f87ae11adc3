"""The messages, as frozen structs. Each is small JSON; tensors travel apart from them, in chunks.

Whatever a message holds has a limit: texts and tables a length, numbers a range. What exceeds one is malformed.

Each travels inside an :class:`Envelope`, whose ``body`` is its canonical bytes: what a signature covers is exactly what
was sent. Where a fleet has no keys a hash shows what was damaged on its way.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Annotated, Literal, TypeVar

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, MessageError

MAX_MESSAGE = 64 * 1024
"""Largest message in bytes; anything above is refused before it is parsed."""

MAX_CHUNK = 64 * 1024
"""Largest chunk in bytes."""

MAX_PAYLOAD = 64 * 1024 * 1024
"""Largest tensor payload in bytes that a manifest may announce; what the job's tensors need is less, and counts."""

MAX_CHUNKS = 1 << 16
"""Most chunks of a payload: their bitmap fits a message."""

MAX_COUNT = 1 << 53
"""Largest whole number: exact in the JSON of every language, and no database's 64 bits overflow."""

MAX_TIME = 250_000_000_000
"""Latest Unix time: it has a date everywhere."""

MAX_SAMPLES = 1 << 31
"""Most samples that a device may say it trained on."""

MAX_FIGURE = 1e300
"""Largest magnitude of a figure: the sum over a fleet is still finite."""

MAX_FIGURES = 128
"""Most figures of a message."""

MAX_TEXT = 1024
"""Most characters of a text that people read."""

KIT = version("fleetune")
"""Version of Fleetune."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z"
"""What a name that stands in a topic or in a path looks like."""

Name = Annotated[str, msgspec.Meta(pattern=NAME)]
UpdateId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,95}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Word = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._+-]{0,64}\Z")]
Reason = Annotated[str, msgspec.Meta(pattern=r"^[a-z-]{0,64}\Z")]
Phrase = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Bitmap = Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNKS // 8)]
Time = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIME)]
Figure = (
    Annotated[float, msgspec.Meta(ge=-MAX_FIGURE, le=MAX_FIGURE)]
    | Annotated[int, msgspec.Meta(ge=-MAX_COUNT, le=MAX_COUNT)]
    | Phrase
    | bool
)
Figures = Annotated[
    dict[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")], Figure], msgspec.Meta(max_length=MAX_FIGURES)
]

_MAX_WHY = 200
"""Characters of what is wrong with a message: it may quote what the sender wrote."""

PresenceState = Literal["online", "working", "idle", "declined", "failed", "offline"]

Stage = Literal["prepare", "global", "personal", "train", "evaluate", "finished"]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Envelope(_Struct, frozen=True):
    """A message as it travels: with a hash, or with key and signature.

    Attributes:
        body: Canonical bytes of the message.
        sha256: Their hash; only where nothing is signed.
        key: Id of the signing key.
        signature: By that key, 64 bytes.
    """

    body: msgspec.Raw
    sha256: Sha256 | None = None
    key: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] | None = None


class Payload(_Struct, frozen=True):
    """Tensors that travel in chunks.

    Attributes:
        codec: How the tensors were turned into bytes.
        sha256: Hash of those bytes, and the payload's name.
        size: Their number.
        chunk_size: Bytes of every chunk but the last.
    """

    codec: Word
    sha256: Sha256
    size: Count
    chunk_size: Count

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.size // self.chunk_size)


class Privacy(_Struct, frozen=True):
    """What a device does to its update before it leaves: differential privacy of the device as a whole.

    Attributes:
        clip: L2 norm that the update, all tensors together, is cut to: C.
        noise: Standard deviation of the Gaussian noise on each value, over C: z.
        accuracy: Whether accuracies on test samples are asked for when the job ends. Nothing covers these.
    """

    clip: Annotated[float, msgspec.Meta(gt=0)]
    noise: Annotated[float, msgspec.Meta(gt=0)]
    accuracy: bool = False


class Announcement(_Struct, frozen=True):
    """The aggregator announces a round, and the global tensors that it starts from.

    Global tensors are known by the hash of their bytes, and travel as differences: ``changes`` lead from the ones of
    the broadcast before to the ones of this; who lacks those asks for ``whole``.

    Attributes:
        fleet: Name of the fleet.
        run: Id of the run that the job belongs to; what a device keeps from another run has no part in it.
        job: Name of the job.
        version: Grows by one with every announcement of the job.
        method: ``fedms``, ``pfedmoe``, ``standalone`` or ``frozen-head``.
        stage: What devices do.
        round: Rounds in which devices train, up to this one and with it.
        rounds: All of them in the job; preparation and evaluation do not count.
        backbone: Hash of what all devices must have alike: of the backbone's weights before they were quantised, or in
            pFedMoE of the shared extractor; a device with another one declines. Empty where nothing is shared.
        quantisation: How the pack stores weights, likewise; empty where devices may differ in it.
        settings: Hyper-parameters of the method.
        issued: Unix time at which it was said, by the aggregator's clock; it grows with every announcement.
        expires: Unix time after which the announcement is void.
        whole: The global tensors, less the initial ones that follow from the job's seed, in float32; absent while
            nobody has trained any.
        since: Hash of the global tensors that ``changes`` are added to; absent for the initial ones.
        changes: What was added since then; absent if nothing was.
        privacy: What protects the devices' data; absent if nothing but that they stay where they are.
    """

    fleet: Name
    run: Name
    job: Name
    version: Count
    method: Word
    stage: Stage
    round: Count
    rounds: Count
    backbone: Word
    quantisation: Word
    settings: Figures
    issued: Time
    expires: Time
    whole: Payload | None = None
    since: Sha256 | None = None
    changes: Payload | None = None
    privacy: Privacy | None = None


class UpdateManifest(_Struct, frozen=True):
    """A device announces what it sends up.

    Attributes:
        fleet: Name of the fleet.
        device: Id of the device.
        update: Id of the update, unique for the device.
        run: The run.
        job: Its job.
        version: The announcement that it answers.
        issued: When that was issued.
        backbone: That of the announcement.
        samples: Weight of the update in the mean; 1 where it is private.
        metrics: What the device measured in the round.
        payload: What the round added to the tensors that it started from; absent if nothing goes up.
        noise: Noise that made the update private, over the clip; 0 if it is not.
    """

    fleet: Name
    device: Name
    update: UpdateId
    run: Name
    job: Name
    version: Count
    issued: Time
    backbone: Word
    samples: Annotated[int, msgspec.Meta(ge=0, le=MAX_SAMPLES)]
    metrics: Figures
    payload: Payload | None = None
    noise: float = 0.0


class Ack(_Struct, frozen=True):
    """The aggregator answers an update: it is in the journal, or it is refused for a reason."""

    update: UpdateId
    accepted: bool
    reason: Reason = ""


class Missing(_Struct, frozen=True):
    """The aggregator asks a device for chunks of an update: bit i of byte i // 8, lowest bit first."""

    update: UpdateId
    bitmap: Bitmap


class Need(_Struct, frozen=True):
    """A device asks the aggregator for chunks of a payload of a job's broadcast that it missed."""

    job: Name
    sha256: Sha256
    bitmap: Bitmap


class Presence(_Struct, frozen=True):
    """Where a device or the aggregator stands.

    Attributes:
        name: Id of the device, or ``aggregator``.
        state: ``online``, ``working``, ``idle``, ``declined`` (here, but the job does not suit it), ``failed`` (it has
            ended) or ``offline``.
        boot: Counts the starts of the process, so that the Will of an earlier one can be told from this one.
        kit: Version of Fleetune.
        detail: What it is doing, for people.
        facts: Figures to show: plan, round, loss, accuracy, bytes.
    """

    name: Name
    state: PresenceState
    boot: Count
    kit: Word
    detail: Phrase = ""
    facts: Figures = {}


def shortened(text: str) -> str:
    """A text that people read, as far as it fits a message."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


class Who(_Struct, frozen=True):
    """The aggregator asks a device to introduce itself: its key or its presence is not known."""


class TimeRequest(_Struct, frozen=True):
    """A device that doubts its clock asks for the time; the answer names the nonce, so it is no older than this."""

    nonce: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class TimeReply(_Struct, frozen=True):
    """The aggregator's Unix time."""

    nonce: str
    now: float


Message = TypeVar("Message", bound=msgspec.Struct)

_encoder = msgspec.json.Encoder(order="deterministic")


def encode(message: msgspec.Struct) -> bytes:
    """Canonical bytes of a message."""
    return _encoder.encode(message)


def decode(raw: bytes, kind: type[Message]) -> Message:
    """Parse a message.

    Raises:
        MessageError: It is too large (``message-too-large``) or not of this kind (``malformed``).
    """
    if len(raw) > MAX_MESSAGE:
        raise MessageError(
            f"a message of {len(raw)} bytes exceeds {MAX_MESSAGE}", "send tensors in chunks", reason="message-too-large"
        )
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNDECODABLE as error:
        raise MessageError(
            f"not a {kind.__name__}: {str(error)[:_MAX_WHY]}",
            "use the same version of Fleetune on both sides",
            reason="malformed",
        ) from error


def seal(message: msgspec.Struct) -> bytes:
    """Put a message into an envelope that is not signed."""
    body = encode(message)
    return encode(Envelope(body=msgspec.Raw(body), sha256=hashlib.sha256(body).hexdigest()))


def read_envelope(raw: bytes) -> Envelope:
    """Read an envelope, whose body is not looked at.

    Raises:
        MessageError: It is too large (``message-too-large``), or not what was sent (``damaged``), so that it may help
            to have it sent again.
    """
    try:
        return decode(raw, Envelope)
    except MessageError as error:
        if error.reason != "malformed":
            raise
        raise MessageError(error.what, error.remedy, reason="damaged") from error


def open_envelope(raw: bytes, kind: type[Message]) -> Message:
    """Take a message out of its envelope, whoever has signed it.

    Raises:
        MessageError: As :func:`read_envelope`; or it is not a message of this kind (``malformed``).
    """
    envelope = read_envelope(raw)
    if envelope.signature is None and hashlib.sha256(envelope.body).hexdigest() != envelope.sha256:
        raise MessageError("a message's hash is not its own", "send it again", reason="damaged")
    return decode(bytes(envelope.body), kind)
