"""Messages, topics, addresses: good ones arrive as they left, bad ones are refused for a reason."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import ConfigError, MessageError
from fleetune.edge.protocol.messages import (
    MAX_CHUNKS,
    MAX_FIGURES,
    MAX_MESSAGE,
    MAX_SAMPLES,
    MAX_TEXT,
    Ack,
    Announcement,
    Envelope,
    Missing,
    Need,
    Payload,
    Presence,
    UpdateManifest,
    decode,
    encode,
    open_envelope,
    seal,
    shortened,
)
from fleetune.edge.protocol.topics import Topics, check_name, read_number


def reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(MessageError) as caught:
        call(*arguments)
    assert caught.value.remedy
    return caught.value.reason


# --- messages -----------------------------------------------------------------------------------------------

PAYLOAD = Payload(codec="f16", sha256="ab" * 32, size=5, chunk_size=4)
ANNOUNCEMENT = Announcement(
    fleet="lab",
    run="5f0c",
    job="fedms",
    version=3,
    method="fedms",
    stage="global",
    round=2,
    rounds=11,
    backbone="cd" * 32,
    quantisation="nf4",
    settings={"learning_rate": 1e-3, "depth": 2, "mix": "logits", "fast": True},
    issued=0.0,
    expires=1.5e9,
    whole=PAYLOAD,
    since="ef" * 32,
    changes=PAYLOAD,
)
UPDATE = UpdateManifest(
    fleet="lab", device="nano-1", update="fedms-3", run="5f0c", job="fedms", version=3, issued=0.0,
    backbone="cd" * 32, samples=7,
    metrics={"loss": 0.25, "depth": 2, "stopped_early": False, "bound_by": "cpu"},
)  # fmt: skip
MESSAGES = [
    ANNOUNCEMENT,
    UPDATE,
    msgspec.structs.replace(UPDATE, payload=PAYLOAD),
    Ack("fedms-3", accepted=False, reason="stale-round"),
    Missing("fedms-3", b"\x05\x00\xff"),
    Need("fedms", "ab" * 32, b"\x01"),
    Presence("nano-1", "working", 3, "0.1.0", "trains", {"loss": 0.5, "round": 2}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_left(message: Any) -> None:
    raw = encode(message)
    assert decode(raw, type(message)) == message
    assert encode(decode(raw, type(message))) == raw
    assert open_envelope(seal(message), type(message)) == message


def test_whole_numbers_and_truth_values_keep_their_type() -> None:
    metrics = decode(encode(UPDATE), UpdateManifest).metrics
    assert {name: type(value) for name, value in metrics.items()} == {
        "loss": float, "depth": int, "stopped_early": bool, "bound_by": str,
    }  # fmt: skip


def test_canonical_bytes_are_these_whatever_the_order_of_the_settings() -> None:
    turned = msgspec.structs.replace(
        ANNOUNCEMENT,
        settings=dict(reversed(ANNOUNCEMENT.settings.items())),
        whole=None,
        since=None,
        changes=None,
    )
    assert encode(turned) == (
        b'{"fleet":"lab","run":"5f0c","job":"fedms","version":3,"method":"fedms","stage":"global","round":2,"rounds":11,"backbone":"'
        + b"cd" * 32
        + b'","quantisation":"nf4","settings":{"depth":2,"fast":true,"learning_rate":0.001,"mix":"logits"},'
        + b'"issued":0.0,"expires":1500000000.0}'
    )


def test_the_envelope_holds_the_canonical_bytes() -> None:
    assert bytes(decode(seal(ANNOUNCEMENT), Envelope).body) == encode(ANNOUNCEMENT)


def changed(**changes: Any) -> bytes:
    document = json.loads(encode(msgspec.structs.replace(UPDATE, payload=PAYLOAD))) | changes
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


@pytest.mark.parametrize("raw", [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\x00\x01",
    b'{"fleet": "\xff"}',
    b"[" * 50_000,
    b'{"metrics": ' + b"[" * 50_000,
    changed(samples="7"),
    changed(samples=7.5),
    changed(samples=None),
    changed(version=...),
    changed(surprise=1),
    changed(metrics={"loss": None}),
    changed(metrics={"loss": [1]}),
    changed(payload={"codec": "f16"}),
    changed(samples=-1),
    changed(samples=MAX_SAMPLES + 1),
    changed(version=-1),
    changed(version=1 << 63),
    changed(version=10**400),
    changed(backbone="cd\n"),
    changed(backbone="x" * 65),
    changed(metrics={"loss": 10**30}),
    changed(metrics={"loss": 1.1e300}),
    changed(metrics={"loss": "x" * (MAX_TEXT + 1)}),
    changed(metrics={"a b": 1}),
    changed(metrics={"": 1}),
    changed(metrics={"x" * 65: 1}),
    changed(metrics={f"m{n}": n for n in range(MAX_FIGURES + 1)}),
    changed(payload=json.loads(encode(PAYLOAD)) | {"codec": "f16\x1b[2J"}),
    changed(payload=json.loads(encode(PAYLOAD)) | {"size": -1}),
    changed(payload=json.loads(encode(PAYLOAD)) | {"chunk_size": 1 << 54}),
])  # fmt: skip
def test_what_is_not_a_message_is_malformed(raw: bytes) -> None:
    assert reason(decode, raw, UpdateManifest) == "malformed"
    assert reason(open_envelope, raw, UpdateManifest) == "damaged"
    if raw.startswith(b"{") and raw.endswith(b"}"):
        sha256 = hashlib.sha256(raw).hexdigest().encode()
        whole = b'{"body":' + raw + b',"sha256":"' + sha256 + b'"}'
        assert reason(open_envelope, whole, UpdateManifest) == "malformed"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_manifest_of_which_one_bit_is_another_is_damaged(message: Any) -> None:
    sealed = seal(message)
    for bit in range(len(sealed) * 8):
        raw = bytearray(sealed)
        raw[bit // 8] ^= 1 << bit % 8
        assert reason(open_envelope, bytes(raw), type(message)) == "damaged"


@pytest.mark.parametrize("sha256", ["", "../../../etc/passwd", "ab" * 31, "AB" * 32, "zz" * 32, "ab" * 200])
def test_a_payload_without_a_proper_hash_is_malformed(sha256: str) -> None:
    assert (
        reason(decode, changed(payload=json.loads(encode(PAYLOAD)) | {"sha256": sha256}), UpdateManifest) == "malformed"
    )


# A device and the aggregator keep files under the names that they are told.
@pytest.mark.parametrize("name", ["", "../other", "a/b", "..", ".hidden", "a\n", "a\0", "a" * 200, 5, None])
@pytest.mark.parametrize("field", ["fleet", "device", "update", "run", "job"])
def test_a_name_that_could_lead_elsewhere_is_malformed(field: str, name: Any) -> None:
    assert reason(decode, changed(**{field: name}), UpdateManifest) == "malformed"


def test_an_answer_cannot_name_a_file_elsewhere() -> None:
    assert reason(decode, b'{"update": "../counters", "accepted": true}', Ack) == "malformed"


@pytest.mark.parametrize("sha256", ["", "../current", "ab" * 31, "AB" * 32, "+", "#"])
def test_a_broadcast_is_asked_for_by_a_proper_hash(sha256: str) -> None:
    raw = encode(Need("fedms", "ab" * 32, b"\x01"))
    assert reason(decode, raw.replace(b"ab" * 32, sha256.encode()), Need) == "malformed"


@pytest.mark.parametrize("level", ["", "-1", "x", "1.0", " 1", "1\n", "1000000", "٣"])
def test_a_level_that_is_no_chunks_number_is_none(level: str) -> None:
    assert read_number(level) is None


@pytest.mark.parametrize(("level", "number"), [("0", 0), ("65535", 65535), ("007", 7)])
def test_a_chunks_number_is_read(level: str, number: int) -> None:
    assert read_number(level) == number


@pytest.mark.parametrize("changes", [
    {"version": -1}, {"round": -1}, {"rounds": 1 << 54}, {"expires": -1.0}, {"expires": 1e15}, {"method": "fed ms"},
    {"quantisation": "nf4\n"}, {"settings": {f"s{n}": n for n in range(MAX_FIGURES + 1)}}, {"settings": {"a/b": 1}},
])  # fmt: skip
def test_an_announcement_beyond_the_limits_is_malformed(changes: dict[str, Any]) -> None:
    raw = json.dumps(json.loads(encode(ANNOUNCEMENT)) | changes).encode()
    assert reason(decode, raw, Announcement) == "malformed"


@pytest.mark.parametrize("changes", [
    {"detail": "x" * (MAX_TEXT + 1)}, {"kit": "0.1\n"}, {"boot": -1}, {"boot": 1 << 60}, {"facts": {"loss": [1]}},
    {"facts": {f"f{n}": n for n in range(MAX_FIGURES + 1)}},
])  # fmt: skip
def test_a_presence_beyond_the_limits_is_malformed(changes: dict[str, Any]) -> None:
    raw = json.dumps(json.loads(encode(MESSAGES[-1])) | changes).encode()
    assert reason(decode, raw, Presence) == "malformed"


def test_what_a_device_has_to_say_is_cut_to_what_fits() -> None:
    for text in ("short", "x" * MAX_TEXT, "ä" * (5 * MAX_TEXT)):
        said = Presence("nano-1", "declined", 1, "0.1.0", shortened(text))
        assert decode(encode(said), Presence) == said
        assert said.detail[:100] == text[:100]


@pytest.mark.parametrize("reason_given", ["not finite", "no-room\n", "x" * 65, "wrong_shape", "1"])
def test_an_answer_with_another_reason_than_a_code_is_malformed(reason_given: str) -> None:
    raw = json.dumps({"update": "u", "accepted": False, "reason": reason_given}).encode()
    assert reason(decode, raw, Ack) == "malformed"


def test_a_request_for_more_chunks_than_a_payload_may_have_is_malformed() -> None:
    most = Missing("u", bytes(MAX_CHUNKS // 8))
    assert decode(encode(most), Missing) == most
    assert reason(decode, encode(Missing("u", bytes(MAX_CHUNKS // 8 + 1))), Missing) == "malformed"


def test_what_is_wrong_is_said_briefly_however_much_was_sent() -> None:
    with pytest.raises(MessageError) as caught:
        decode(json.dumps({"x" * 60_000: 1}).encode(), Ack)
    assert len(str(caught.value)) < 500


def test_a_bitmap_that_is_not_base64_is_malformed() -> None:
    assert reason(decode, b'{"update": "u", "bitmap": "%%%"}', Missing) == "malformed"


def test_a_state_that_does_not_exist_is_malformed() -> None:
    assert reason(decode, encode(MESSAGES[-1]).replace(b"working", b"dancing"), Presence) == "malformed"


@pytest.mark.parametrize("call", [decode, open_envelope])
def test_a_message_that_is_too_large_is_refused_before_it_is_parsed(call: Any) -> None:
    assert reason(call, b" " * (MAX_MESSAGE + 1), Ack) == "message-too-large"


def test_a_message_of_exactly_the_largest_size_is_read() -> None:
    raw = encode(Ack("u", accepted=True))
    assert decode(raw + b" " * (MAX_MESSAGE - len(raw)), Ack) == Ack("u", accepted=True)


@settings(max_examples=300)
@given(
    st.sampled_from(MESSAGES),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.integers(0, 600),
)
def test_whatever_the_message_only_a_message_error_comes_out(
    message: Any, changes: list[tuple[int, int]], length: int
) -> None:
    raw = bytearray(seal(message))
    for position, value in changes:
        raw[position % len(raw)] = value
    try:
        open_envelope(bytes(raw[:length]), type(message))
    except MessageError as error:
        assert error.reason in ("damaged", "malformed", "message-too-large")


# --- topics and addresses -----------------------------------------------------------------------------------

BAD_NAMES = ["", "a/b", "+", "#", "a+", "a#b", "-a", "_a", "a b", "a.b", "ä", "a\n", "$SYS", "a" * 65, "a\0"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_with_a_meaning_in_topics_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device: "):
        check_name("device", name)
    with pytest.raises(ConfigError, match="fleet: "):
        Topics(name)


@pytest.mark.parametrize("name", ["a", "0", "nano-1", "A_b-C", "a" * 64])
def test_good_names_are_returned(name: str) -> None:
    assert check_name("device", name) == name


def test_topics_split_into_what_they_were_made_of() -> None:
    topics = Topics("lab")
    assert topics.split(topics.presence("nano-1")) == ("st", "nano-1")
    assert topics.split(topics.aggregator_presence) == ("agg", "st")
    assert topics.split(topics.current("fedms")) == ("g", "fedms", "current")
    assert topics.split(topics.broadcast_chunk("fedms", "ab" * 32, 7)) == ("g", "fedms", "ab" * 32, "7")
    assert topics.split(topics.repair_chunk("fedms", "ab" * 32, 7)) == ("g", "fedms", "ab" * 32, "r", "7")
    assert topics.split(topics.upload_manifest("nano-1", "u")) == ("up", "nano-1", "u", "m")
    assert topics.split(topics.upload_chunk("nano-1", "u", 2)) == ("up", "nano-1", "u", "2")
    assert topics.split(topics.up("nano-1", "need")) == ("up", "nano-1", "need")
    assert topics.split(topics.down("nano-1", "ack")) == ("dn", "nano-1", "ack")


@pytest.mark.parametrize("topic", [
    "ft/1/lab2/st/a", "ft/2/lab/st/a", "lab/st/a", "ft/1/lab", "", "ft/1/lab/st/", "ft/1/lab/st/+", "ft/1/lab/up/#",
    "ft/1/lab/st/a\n", "ft/1/lab/st/..", "ft/1/lab/st/a\0", "ft/1/lab/st/" + "x" * 97, "ft/1/lab/a/b/c/d/e/f",
    "ft/1/lab/st/\x1b[2J", "ft/1/lab/st/ä", "ft/1/lab//a",
])  # fmt: skip
def test_topics_of_others_are_not_split(topic: str) -> None:
    assert Topics("lab").split(topic) == ()


@pytest.mark.parametrize(("url", "host", "port"), [
    ("mqtt://broker", "broker", 1883),
    ("mqtt://broker:1884", "broker", 1884),
    ("mqtt://10.0.0.1:1", "10.0.0.1", 1),
    ("mqtt://[::1]:1885", "::1", 1885),
    ("mqtt://[fe80::1]", "fe80::1", 1883),
    ("mqtts://broker", "broker", 8883),
    ("mqtts://broker:1883", "broker", 1883),
])  # fmt: skip
def test_addresses_are_parsed_and_written_alike(url: str, host: str, port: int) -> None:
    address = BrokerAddress.parse(url)
    assert address == BrokerAddress(host, port, url.startswith("mqtts"))
    assert BrokerAddress.parse(str(address)) == address


@pytest.mark.parametrize("url", [
    "",
    "broker",
    "broker:1883",
    "http://broker",
    "mqtt://",
    "mqtt://:1883",
    "mqtt://broker:port",
    "mqtt://broker:65536",
    "mqtt://broker:-1",
    "mqtt://broker:0",
    "mqtt://[::1",
    "mqtt://broker/lab",
])  # fmt: skip
def test_what_is_not_an_address_is_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match="broker: ") as caught:
        BrokerAddress.parse(url)
    assert repr(url) in caught.value.what
    assert "mqtts://host:port" in caught.value.remedy


@pytest.mark.parametrize("url", ["mqtt://user:secret@broker", "mqtt://:secret@broker", "mqtt://user@broker"])
def test_an_address_with_a_password_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError, match="broker: the address of 'broker' names a user or a password") as caught:
        BrokerAddress.parse(url)
    assert "secret" not in str(caught.value)
    assert "leave them out" in caught.value.remedy
