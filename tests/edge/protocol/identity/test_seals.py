"""What goes out is signed, what comes in is verified: against everything that a broker or a member could try."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import Sender, Trust, sign, sign_trust
from fleetune.edge.protocol.identity.folder import FILE, ROOTS_FILE, read_identity
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.messages import MAX_MESSAGE, Ack, Envelope, TimeReply, decode, encode, seal
from support.guarded import DAY, GuardedFleet

TOPIC = "ft/1/lab/up/nano-1/need"
ACK = Ack("u", accepted=True)
NANO_1, NANO_2 = Sender("device", "nano-1"), Sender("device", "nano-2")
AGGREGATOR = Sender("aggregator", "aggregator")


def reason(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MessageError) as caught:
        call(*arguments)
    return caught.value.reason


@pytest.fixture
def device(lab: GuardedFleet) -> Seals:
    return lab.seals("nano-1")


@pytest.fixture
def aggregator(lab: GuardedFleet, device: Seals, tmp_path: Path) -> Seals:
    """It knows both devices."""
    seals = Seals(lab.copy("aggregator", tmp_path / "aggregator"))
    seals.meet(device.introduction, NANO_1)
    seals.meet(lab.seals("nano-2").introduction, NANO_2)
    return seals


# --- messages -----------------------------------------------------------------------------------------------------


def test_a_message_is_opened_as_it_was_sealed(device: Seals, aggregator: Seals) -> None:
    assert aggregator.open(TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == ACK


def test_a_member_cannot_speak_for_another(device: Seals, aggregator: Seals) -> None:
    assert reason(aggregator.open, TOPIC, device.seal(TOPIC, ACK), Ack, NANO_2) == "wrong-sender"


def test_a_device_cannot_speak_for_the_aggregator(lab: GuardedFleet, device: Seals) -> None:
    other = lab.seals("nano-2")
    assert reason(other.meet, device.introduction, AGGREGATOR) == "wrong-sender"
    other.meet(device.introduction, NANO_1)
    assert reason(other.open, TOPIC, device.seal(TOPIC, ACK), Ack, AGGREGATOR) == "wrong-sender"


@pytest.mark.parametrize("member", ["authority", "publisher"])
def test_nor_can_any_other_member(lab: GuardedFleet, device: Seals, member: str) -> None:
    assert reason(device.meet, lab.seals(member).introduction, AGGREGATOR) == "wrong-sender"


def test_a_message_counts_on_its_topic_alone(device: Seals, aggregator: Seals) -> None:
    raw = device.seal(TOPIC, ACK)
    for topic in ("ft/1/lab/up/nano-1/time", "ft/1/lab/up/nano-2/need", "ft/1/plant/up/nano-1/need", "", f"{TOPIC}/"):
        assert reason(aggregator.open, topic, raw, Ack, NANO_1) == "wrong-signature"


def test_no_bit_of_what_was_signed_may_change(device: Seals, aggregator: Seals) -> None:
    envelope = decode(device.seal(TOPIC, ACK), Envelope)
    body = bytes(envelope.body)
    for changed in (body.replace(b"true", b"false"), body.replace(b":", b": ", 1), body.replace(b"u", b"v", 1), b"{}"):
        raw = encode(msgspec.structs.replace(envelope, body=msgspec.Raw(changed)))
        assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "wrong-signature"


@pytest.mark.parametrize("strip", [("signature",), ("key",), ("key", "signature")])
def test_a_message_without_a_signature_is_refused_where_a_fleet_has_keys(
    device: Seals, aggregator: Seals, strip: tuple[str, ...]
) -> None:
    envelope = decode(device.seal(TOPIC, ACK), Envelope)
    raw = encode(msgspec.structs.replace(envelope, **dict.fromkeys(strip)))
    assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "unsigned"


def test_so_is_one_that_has_a_hash_only(aggregator: Seals) -> None:
    assert reason(aggregator.open, TOPIC, seal(ACK), Ack, NANO_1) == "unsigned"


def test_the_key_that_a_message_names_does_not_help_who_does_not_have_it(device: Seals, aggregator: Seals) -> None:
    forged = decode(sign(TOPIC, ACK, SeedSigner.generate()), Envelope)
    assert reason(aggregator.open, TOPIC, encode(forged), Ack, NANO_1) == "unknown-key"
    named = msgspec.structs.replace(forged, key=decode(device.seal(TOPIC, ACK), Envelope).key)
    assert reason(aggregator.open, TOPIC, encode(named), Ack, NANO_1) == "wrong-signature"


def test_nobody_is_known_who_was_not_introduced(lab: GuardedFleet, device: Seals) -> None:
    assert reason(lab.seals("aggregator").open, TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == "unknown-key"


def test_a_message_of_another_kind_is_malformed_only_after_its_signature(device: Seals, aggregator: Seals) -> None:
    envelope = decode(device.seal(TOPIC, TimeReply("n", 1.0)), Envelope)
    assert reason(aggregator.open, TOPIC, encode(envelope), Ack, NANO_1) == "malformed"
    altered = msgspec.structs.replace(envelope, signature=bytes(64))
    assert reason(aggregator.open, TOPIC, encode(altered), Ack, NANO_1) == "wrong-signature"


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xfe", b"[" * 50_000, b'{"body":' * 8_000])
def test_what_is_no_envelope_is_damaged(aggregator: Seals, raw: bytes) -> None:
    assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "damaged"


def test_what_is_too_large_is_not_parsed(device: Seals, aggregator: Seals) -> None:
    raw = device.seal(TOPIC, ACK) + b" " * MAX_MESSAGE
    assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "message-too-large"


def test_a_side_without_an_identity_signs_nothing_and_reads_everything(device: Seals) -> None:
    plain = Seals()
    assert not plain.signed
    assert plain.introduction == b""
    assert not plain.meet(b"anything", NANO_1)
    assert plain.hear_trust(b"anything") is None
    assert plain.open(TOPIC, plain.seal("another topic", ACK), Ack, AGGREGATOR) == ACK
    assert plain.open(TOPIC, device.seal(TOPIC, ACK), Ack, AGGREGATOR) == ACK


# --- introductions ------------------------------------------------------------------------------------------------


def test_an_introduction_is_news_once(lab: GuardedFleet, device: Seals) -> None:
    seals = lab.seals("aggregator")
    assert seals.meet(device.introduction, NANO_1)
    assert not seals.meet(device.introduction, NANO_1)


def test_nobody_introduces_themselves_as_somebody_else(lab: GuardedFleet, device: Seals) -> None:
    assert reason(lab.seals("aggregator").meet, device.introduction, NANO_2) == "wrong-sender"


@pytest.mark.parametrize(("changes", "expected"), [
    ({"by": SeedSigner(b"\7" * 32)}, "unknown-authority"),
    ({"fleet": "plant"}, "wrong-fleet"),
    ({"begins": time.time() - 40 * DAY, "expires": time.time() - 10 * DAY}, "expired-credential"),
])  # fmt: skip
def test_a_credential_that_does_not_count_introduces_nobody(
    lab: GuardedFleet, changes: dict[str, object], expected: str
) -> None:
    raw, signer = lab.forge("device", "nano-1", **changes)  # type: ignore[arg-type]
    seals = lab.seals("aggregator")
    assert reason(seals.meet, raw, NANO_1) == expected
    assert reason(seals.open, TOPIC, sign(TOPIC, ACK, signer), Ack, NANO_1) == "unknown-key"


def test_a_credential_that_a_device_issued_introduces_nobody(lab: GuardedFleet, device: Seals) -> None:
    signer = device.identity.signer  # type: ignore[union-attr]
    raw, _ = lab.forge("device", "nano-2", by=signer)  # type: ignore[arg-type]
    assert reason(lab.seals("aggregator").meet, raw, NANO_2) == "unknown-authority"


def test_of_a_member_the_newest_two_keys_count(lab: GuardedFleet) -> None:
    """What the key before has signed may still be on its way."""
    seals, now = lab.seals("aggregator"), time.time()
    signers = []
    for i in range(3):
        raw, signer = lab.forge("device", "nano-1", begins=now + i)
        assert seals.meet(raw, NANO_1)
        signers.append(signer)
    first, second, third = (sign(TOPIC, ACK, signer) for signer in signers)
    assert reason(seals.open, TOPIC, first, Ack, NANO_1) == "unknown-key"
    assert seals.open(TOPIC, second, Ack, NANO_1) == seals.open(TOPIC, third, Ack, NANO_1) == ACK


def test_an_older_credential_does_not_come_back(lab: GuardedFleet) -> None:
    """The broker has it, and can say it again whenever it likes."""
    seals, now = lab.seals("aggregator"), time.time()
    older, newer = (lab.forge("device", "nano-1", begins=begins)[0] for begins in (now - 10, now))
    seals.meet(newer, NANO_1)
    assert reason(seals.meet, older, NANO_1) == "old-credential"


def test_a_key_that_gets_a_newer_credential_is_renewed(lab: GuardedFleet) -> None:
    """As a key in a hardware token does."""
    seals, now, signer = lab.seals("aggregator"), time.time(), SeedSigner.generate()
    for begins in (now - DAY, now):
        raw, _ = lab.forge("device", "nano-1", signer=signer, begins=begins, expires=begins + DAY + 60)
        assert seals.meet(raw, NANO_1)
    seals.clock.set(now + DAY / 2)  # the first has expired
    assert seals.open(TOPIC, sign(TOPIC, ACK, signer), Ack, NANO_1) == ACK


# --- time ---------------------------------------------------------------------------------------------------------


def test_the_aggregator_refuses_who_let_its_credential_expire(device: Seals, aggregator: Seals) -> None:
    raw = device.seal(TOPIC, ACK)
    aggregator.clock.set(time.time() + 31 * DAY)
    assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "expired-credential"
    assert reason(aggregator.meet, device.introduction, NANO_1) == "expired-credential"


def test_a_device_whose_clock_is_years_ahead_still_hears_the_aggregator(
    lab: GuardedFleet, device: Seals, aggregator: Seals
) -> None:
    """Nobody else could tell it the time."""
    device.clock.set(time.time() + 5000 * DAY)
    assert device.meet(aggregator.introduction, AGGREGATOR)
    assert device.open("t", aggregator.seal("t", ACK), Ack, AGGREGATOR) == ACK


def test_but_none_whose_credential_has_expired_for_sure(lab: GuardedFleet, device: Seals) -> None:
    """The authority has signed something after that time."""
    now = time.time()
    raw, signer = lab.forge("aggregator", "aggregator", begins=now - 400 * DAY, expires=now - 35 * DAY)
    assert reason(device.meet, raw, AGGREGATOR) == "expired-credential"
    raw, signer = lab.forge("aggregator", "aggregator", begins=now - 2 * DAY, expires=now + DAY)
    device.meet(raw, AGGREGATOR)
    device.clock.passed(now + 2 * DAY)
    assert reason(device.open, "t", sign("t", ACK, signer), Ack, AGGREGATOR) == "expired-credential"


def test_what_an_authority_has_signed_has_passed_for_sure(lab: GuardedFleet) -> None:
    seals, later = lab.seals("nano-2"), time.time() + 10 * DAY
    seals.meet(lab.forge("aggregator", "aggregator", begins=later)[0], AGGREGATOR)
    seals.clock.set(0.0)
    assert seals.clock.now() >= later


def test_a_member_is_told_the_time_only_as_far_as_the_others_credential_reaches(
    lab: GuardedFleet, device: Seals, aggregator: Seals
) -> None:
    now = time.time()
    device.told(AGGREGATOR, now + DAY)  # of somebody who was not introduced
    assert device.clock.now() < now + 60
    device.meet(aggregator.introduction, AGGREGATOR)
    device.told(AGGREGATOR, now + 366 * DAY)
    assert device.clock.now() < now + 60
    device.told(AGGREGATOR, now + DAY)
    assert device.clock.now() >= now + DAY


# --- whom to trust ------------------------------------------------------------------------------------------------


def next_trust(lab: GuardedFleet, *, version: int = 9, by: SeedSigner | None = None, **changes: object) -> bytes:
    trust = msgspec.structs.replace(lab.authority.trust, version=version, issued=time.time(), **changes)
    return sign_trust(trust, by or lab.authority.signer)


def trusted(seals: Seals) -> Trust:
    assert seals.identity is not None
    return seals.identity.trust


def test_whoever_is_revoked_is_refused_at_once_and_after_a_restart(
    lab: GuardedFleet, device: Seals, aggregator: Seals
) -> None:
    raw = device.seal(TOPIC, ACK)
    assert aggregator.hear_trust(next_trust(lab, revoked={"nano-1": time.time()})) is not None
    assert reason(aggregator.open, TOPIC, raw, Ack, NANO_1) == "revoked"
    restarted = Seals(read_identity(aggregator.identity.folder))  # type: ignore[union-attr]
    assert reason(restarted.meet, device.introduction, NANO_1) == "revoked"
    assert restarted.meet(lab.seals("nano-2").introduction, NANO_2)


def test_a_device_is_revoked_until_it_shows_a_newer_credential(lab: GuardedFleet, aggregator: Seals) -> None:
    now = time.time()
    assert aggregator.revoked_devices() == set()
    aggregator.hear_trust(next_trust(lab, revoked={"nano-1": now, "nano-9": now}))  # 9 was never heard of
    assert aggregator.revoked_devices() == {"nano-1", "nano-9"}
    aggregator.meet(lab.forge("device", "nano-1", begins=now + 1)[0], NANO_1)
    assert aggregator.revoked_devices() == {"nano-9"}
    assert Seals().revoked_devices() == set()


def test_what_was_revoked_is_not_brought_back_by_an_older_document(lab: GuardedFleet, aggregator: Seals) -> None:
    aggregator.hear_trust(next_trust(lab, version=9, revoked={"nano-1": time.time()}))
    for version in (1, 8, 9):
        assert aggregator.hear_trust(next_trust(lab, version=version)) is None
    assert trusted(aggregator).revoked


def test_a_document_that_somebody_else_has_signed_is_refused(
    lab: GuardedFleet, device: Seals, aggregator: Seals
) -> None:
    thief = SeedSigner.generate()
    for raw in (
        next_trust(lab, by=thief, authorities=(thief.public,)),
        next_trust(lab, by=device.identity.signer),  # type: ignore[union-attr,arg-type]
    ):
        assert reason(aggregator.hear_trust, raw) == "unknown-authority"
    assert reason(aggregator.hear_trust, next_trust(lab, fleet="plant")) == "wrong-fleet"
    assert trusted(aggregator).version == 1


def test_a_new_authority_is_believed_on_the_word_of_the_old_one(lab: GuardedFleet, aggregator: Seals) -> None:
    old, new = lab.authority.signer, SeedSigner.generate()
    both, alone = (new.public, old.public), (new.public,)
    last = next_trust(lab, version=3, authorities=alone, by=new)
    assert reason(aggregator.hear_trust, last) == "unknown-authority"  # away all the time: it has to enrol again
    aggregator.hear_trust(next_trust(lab, version=2, authorities=both, by=old))
    assert aggregator.hear_trust(last) is not None
    assert reason(aggregator.hear_trust, next_trust(lab, version=4, by=old)) == "unknown-authority"


def test_whom_an_authority_introduced_that_counts_no_more_is_forgotten(
    lab: GuardedFleet, device: Seals, aggregator: Seals
) -> None:
    """Its key may be why it was replaced."""
    old, new = lab.authority.signer, SeedSigner.generate()
    aggregator.hear_trust(next_trust(lab, version=2, authorities=(new.public, old.public)))
    renewed, signer = lab.forge("device", "nano-2", by=new, begins=time.time() + 1)
    aggregator.meet(renewed, NANO_2)
    assert aggregator.open(TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == ACK
    aggregator.hear_trust(next_trust(lab, version=3, authorities=(new.public,), by=new))
    assert reason(aggregator.open, TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == "unknown-key"
    assert reason(aggregator.meet, device.introduction, NANO_1) == "unknown-authority"
    assert aggregator.open(TOPIC, sign(TOPIC, ACK, signer), Ack, NANO_2) == ACK
    again, _ = lab.forge("device", "nano-1", by=new)
    assert aggregator.meet(again, NANO_1)


def test_a_document_counts_even_where_there_is_no_room_to_keep_it(
    lab: GuardedFleet, device: Seals, aggregator: Seals, caplog: pytest.LogCaptureFixture
) -> None:
    folder = aggregator.identity.folder  # type: ignore[union-attr]
    with broken(folder / FILE):
        assert aggregator.hear_trust(next_trust(lab, revoked={"nano-1": time.time()})) is not None
    assert "version 9 of the trust document cannot be kept" in caplog.text
    assert reason(aggregator.open, TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == "revoked"


@pytest.mark.parametrize("file", [FILE, ROOTS_FILE])
def test_a_document_that_was_kept_by_half_is_heard_again_after_a_restart(
    lab: GuardedFleet, aggregator: Seals, file: str
) -> None:
    """Else the roots that came with it would never be written, and no broker of theirs be believed."""
    folder = aggregator.identity.folder  # type: ignore[union-attr]
    raw = next_trust(lab, roots=(*lab.authority.trust.roots, "another\n"))
    with broken(folder / file):
        aggregator.hear_trust(raw)
    restarted = Seals(read_identity(folder))
    assert restarted.hear_trust(raw) is not None
    assert (folder / ROOTS_FILE).read_text().endswith("another\n")


class broken:  # noqa: N801 - it reads as a word
    """A file that cannot be replaced for a while."""

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, path.with_suffix(".held")

    def __enter__(self) -> None:
        self._path.rename(self._held)
        (self._path / "in the way").mkdir(parents=True)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path)
        self._held.rename(self._path)


def test_a_renewed_identity_signs_from_then_on(lab: GuardedFleet, device: Seals) -> None:
    aggregator, raw = lab.seals("aggregator"), device.seal(TOPIC, ACK)
    identity = device.identity
    assert identity is not None
    envelope, signer = lab.forge("device", "nano-1", begins=time.time() + 1)
    aggregator.meet(device.introduction, NANO_1)
    credential = msgspec.structs.replace(identity.credential, key=signer.public, begins=time.time() + 1)
    device.become(dataclasses.replace(identity, credential=credential, envelope=envelope, signer=signer))
    aggregator.meet(device.introduction, NANO_1)
    assert decode(device.seal(TOPIC, ACK), Envelope).key == key_id(signer.public)
    assert aggregator.open(TOPIC, device.seal(TOPIC, ACK), Ack, NANO_1) == ACK
    assert aggregator.open(TOPIC, raw, Ack, NANO_1) == ACK
