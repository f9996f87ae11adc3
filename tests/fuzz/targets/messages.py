"""What comes over the network, message by message, and what each side does with the values in it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from fleetune.edge.methods.base import job_shapes
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import CODECS, Codec
from fleetune.edge.protocol.errors import ConfigError, MessageError
from fleetune.edge.protocol.link import Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Missing,
    Need,
    Presence,
    UpdateManifest,
    decode,
    encode,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics, check_name, read_number
from fleetune.edge.resources.limits import Budget
from fleetune.profiles.fleet import Fleet, FleetDevice
from fleetune.profiles.profile import read_profile
from fleetune.server.intake import accuracies, in_words
from fleetune.server.journal import Accepted, Closed
from fleetune.server.registry import Registry
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds
from fleetune.server.store import Store
from fleetune.server.strategies.base import NextRound
from fleetune.tools.demo.watch import Watch
from fleetune.tools.text import visible
from fuzz.choices import Choices
from fuzz.documents import ANNOUNCEMENT, JOB, MANIFEST, PAYLOAD, SHAPES, TENSORS, UPDATE
from fuzz.mutations import compressed, from_seeds, mutate_bytes, mutate_json, mutate_sealed, mutate_tensors
from fuzz.target import MIB, Target

PRESENCE = Presence(
    "nano-1", "working", 3, "0.1.0", "trains",
    {"loss": 0.5, "test": 0.25, "progress": 0.5, "plan": "depth 2", "bound_by": "cpu", "job": "fedms",
     "stage": "global", "round": 2, "bytes_up": 5, "bytes_down": 7},
)  # fmt: skip
LEADS = Presence(
    "aggregator", "working", 1_700_000_000_000, "0.1.0", "collects",
    {"job": "fedms", "stage": "global", "round": 2, "rounds": 6, "depth": 2, "updates": 1, "quarantined": "b: x"},
)  # fmt: skip
ACK, MISSING = Ack("r-fedms-3", accepted=False, reason="stale-round"), Missing("r-fedms-3", b"\x05\x00\xff")
NEED = Need("fedms", "ab" * 32, b"\x01")


# --- messages ---------------------------------------------------------------------------------------------------


def announcement(data: bytes, _folder: Path) -> None:
    announced = open_envelope(data, Announcement)
    assert decode(encode(announced), Announcement) == announced
    for payload in (announced.whole, announced.changes):
        if payload is not None:
            chunks.check(payload, Codec.named(payload.codec).most(SHAPES))
    shapes = job_shapes(MANIFEST, announced.settings)
    assert all(len(shape) <= 2 and min(shape) > 0 for shape in shapes.values())


def update(data: bytes, _folder: Path) -> None:
    manifest = open_envelope(data, UpdateManifest)
    assert decode(encode(manifest), UpdateManifest) == manifest
    visible(accuracies(manifest.metrics) + in_words(manifest.metrics))
    current = OpenRound(ANNOUNCEMENT, NextRound("global", 2), Bounds(JOB.rule, None), lambda _accepted: dict(TENSORS))
    accepted = Accepted(manifest, 1.0, into=manifest.version)
    for _ in range(3):
        current.add(accepted, TENSORS)
    means = current.means()
    assert all(np.isfinite(list(means.values())))
    assert all(np.isfinite(tensor).all() for tensor in current.gain().values())
    store = Store(":memory:")
    store.add([accepted, Closed(manifest.job, manifest.version, [manifest.device], 2.0, 0, means)], 1)
    assert list(store.accepted(manifest.job, manifest.version)) == [accepted]
    store.close()


def presence(data: bytes, _folder: Path) -> None:
    heard = decode(data, Presence)
    assert decode(encode(heard), Presence) == heard
    registry, store = Registry(frozenset()), Store(":memory:")
    registry.update(PRESENCE)
    registry.update(heard, retained=True)
    registry.update(heard)
    registry.save(store)
    assert visible(registry.describe(heard.name)).isprintable()
    assert {row.boot for row in store.devices()} == {PRESENCE.boot, heard.boot} - (
        {PRESENCE.boot} if heard.name == PRESENCE.name and heard.state != "offline" else set()
    ) or heard.name == PRESENCE.name
    store.close()


FLEET = Fleet("lab", tuple(FleetDevice(name, read_profile("x86-64"), Budget(512.0)) for name in ("nano-1", "nano-2")))


def watched(data: bytes, _folder: Path) -> None:
    watch = Watch(BrokerAddress("127.0.0.1", 1), FLEET)
    for body in (encode(LEADS), data.replace(b"aggregator", b"nano-1"), data.replace(b"nano-1", b"aggregator")):
        sealed = b'{"body":%b,"sha256":"%b"}' % (body, hashlib.sha256(body).hexdigest().encode())
        watch._link._events.put(Received("ft/1/lab/st/x", sealed))
    watch.update(0.0)
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=False).print(watch.render(), watch.line())
    assert "\x1b" not in out.getvalue()


def answer(data: bytes, _folder: Path) -> None:
    ack = decode(data, Ack)
    assert visible(ack.reason) == ack.reason


def missing(data: bytes, _folder: Path) -> None:
    asked = decode(data, Missing)
    assert all(0 <= index < 65536 for index in chunks.unpack_bitmap(asked.bitmap, 65536))


def need(data: bytes, _folder: Path) -> None:
    asked = decode(data, Need)
    assert len(list(chunks.unpack_bitmap(asked.bitmap, 9))) <= 9


# --- topics, addresses ------------------------------------------------------------------------------------------

TOPICS = Topics("lab")
SEEN = [
    topic.encode()
    for topic in (
        *(TOPICS.presence("nano-1"), TOPICS.aggregator_presence, TOPICS.current("fedms"), TOPICS.up("nano-1", "need")),
        *(TOPICS.broadcast_chunk("fedms", "ab" * 32, 7), TOPICS.repair_chunk("fedms", "ab" * 32, 7)),
        *(TOPICS.upload_manifest("nano-1", "u"), TOPICS.upload_chunk("nano-1", "u", 2), TOPICS.down("nano-1", "ack")),
    )
]


def topic(data: bytes, folder: Path) -> None:
    levels = TOPICS.split(data.decode(errors="replace"))
    for level in levels:
        assert level.isascii()
        assert not set(level) & set("+#/.\0") and level.isprintable()
        assert (folder / level).parent == folder
        number = read_number(level)
        assert number is None or 0 <= number < 10**6


def address(data: bytes, _folder: Path) -> None:
    url = data.decode(errors="surrogateescape")
    found = BrokerAddress.parse(url)
    assert 0 < found.port < 65536
    assert BrokerAddress.parse(str(found)) == found


def name(data: bytes, folder: Path) -> None:
    good = check_name("device", data.decode(errors="surrogateescape"))
    assert (folder / good).parent == folder


# --- chunks -----------------------------------------------------------------------------------------------------


def bitmap(data: bytes, _folder: Path) -> None:
    count = int.from_bytes(data[:2], "little") % 600
    found = list(chunks.unpack_bitmap(data[2:], count))
    assert found == sorted(set(found))
    assert list(chunks.unpack_bitmap(chunks.pack_bitmap(found, count), count)) == found


def assembly(data: bytes, folder: Path) -> None:
    """Chunks in any order, twice, wrong, with restarts in between, slow or quick."""
    choices = Choices(data)
    whole = bytes(range(256)) * (1 + choices.below(4))
    payload = chunks.describe(whole, "f32", 16 + choices.below(700))
    if not choices.often():
        payload = msgspec.structs.replace(
            payload, **{choices.pick(["size", "chunk_size"]): choices.pick([0, 1, 2**16, 2**27, 2**53])}
        )
    taken = chunks.Assembly(payload, folder / "parts")
    before, chunks._QUICK = chunks._QUICK, -1.0 if choices.below(2) else 9.0
    try:
        for _ in range(24):
            if choices.spent:
                break
            kind, index = choices.below(16), choices.below(min(payload.chunks + 2, 1 << 20))
            part = whole[index * payload.chunk_size : (index + 1) * payload.chunk_size]
            if kind == 0:
                taken = chunks.Assembly(payload, folder / "parts")
            elif kind == 1:
                taken.let_go()
            elif kind == 2:
                part = mutate_bytes(choices, part)
            try:
                taken.add(index - 1 if kind == 3 else index, part)
            except MessageError as error:
                assert error.reason == "wrong-chunk"
            assert set(taken.missing) == set(chunks.unpack_bitmap(taken.missing_bitmap(), payload.chunks))
            if taken.complete:
                assert taken.finish() == whole
                assert not taken.complete
        for index, part in chunks.cut(whole, payload, taken.missing if payload.size == len(whole) else ()):
            taken.add(index, part)
        if taken.complete:
            assert taken.finish() == whole
    finally:
        chunks._QUICK = before


# --- tensors ----------------------------------------------------------------------------------------------------


def codec(named: str) -> Target:
    one = Codec.named(named)
    rng = np.random.default_rng(0)
    seeds = [
        one.encode(TENSORS),
        one.encode({n: t + rng.normal(0, 1, t.shape).astype("f4") for n, t in TENSORS.items()}),
    ]
    plain = one.compressed

    def run(data: bytes, _folder: Path) -> None:
        found = one.decode(data, SHAPES)
        for tensor_name, tensor in found.items():
            assert tensor.shape == SHAPES[tensor_name]
            assert tensor.dtype == np.float32
            assert np.isfinite(tensor).all()

    mutations: list[Callable[[Choices, bytes], bytes]] = [mutate_tensors, mutate_bytes]
    if plain:
        mutations = [compressed(mutate_tensors), compressed(mutate_bytes), _bomb]
    return Target(f"codec {named}", from_seeds(seeds, *mutations), run, (MessageError,), memory=256 << 10)


def _bomb(choices: Choices, data: bytes) -> bytes:
    """Megabytes of zeros behind what was there."""
    del data
    from zlib import compress

    return compress(TENSOR_BYTES + bytes(choices.pick([1 << 10, 1 << 16, 1 << 20])), 1)


TENSOR_BYTES = Codec.named("f32").encode(TENSORS)


def _sealed(message: Any) -> Callable[[Choices], bytes]:
    others = [seal(message), seal(msgspec.structs.replace(message, **_less(message)))]
    return from_seeds(others, mutate_sealed, mutate_sealed, mutate_json, mutate_bytes)


def _less(message: Any) -> dict[str, Any]:
    return (
        {"payload": None} if isinstance(message, UpdateManifest) else {"whole": PAYLOAD, "changes": None, "since": None}
    )


def _plain(*messages: Any) -> Callable[[Choices], bytes]:
    return from_seeds([encode(message) for message in messages], mutate_json, mutate_json, mutate_bytes)


def _text(*seeds: bytes) -> Callable[[Choices], bytes]:
    return from_seeds(seeds, mutate_bytes)


URLS = [b"mqtt://broker:1883", b"mqtt://[fe80::1]:1884", b"mqtt://10.0.0.1", b"mqtt://user:secret@broker"]
REFUSED = (MessageError,)
TARGETS = [
    Target("announcement", _sealed(ANNOUNCEMENT), announcement, REFUSED),
    Target("update manifest", _sealed(UPDATE), update, REFUSED),
    Target("presence", _plain(PRESENCE, LEADS), presence, REFUSED),
    Target("presence, watched", _plain(PRESENCE, LEADS), watched, (), memory=4 * MIB, slow=True),
    Target("acknowledgement", _plain(ACK), answer, REFUSED),
    Target("missing", _plain(MISSING), missing, REFUSED),
    Target("need", _plain(NEED), need, REFUSED),
    Target("topic", _text(*SEEN), topic, ()),
    Target("broker's address", _text(*URLS), address, (ConfigError,)),
    Target("name", _text(b"nano-1", b"A_b-9"), name, (ConfigError,)),
    Target("bitmap", Choices.rest, bitmap, ()),
    Target("assembly", Choices.rest, assembly, REFUSED),
    *map(codec, CODECS),
]
