"""Credentials and trust documents: who may say who somebody is, and whom to believe next."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.clock import MAX_SKEW
from fleetune.edge.protocol.identity.credential import (
    Credential,
    Trust,
    check_current,
    check_signature,
    issue,
    read_credential,
    read_signed,
    read_trust,
    sign,
    sign_trust,
    signed_bytes,
)
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.edge.protocol.messages import MAX_MESSAGE, Ack, Envelope, decode, encode

NOW = 1_800_000_000.0
DAY = 86400.0
AUTHORITY, OTHER, DEVICE = (SeedSigner(bytes([i]) * 32) for i in range(3))
TRUST = Trust("lab", 3, NOW, (AUTHORITY.public,))
CREDENTIAL = Credential("lab", "device", "nano-1", DEVICE.public, NOW, NOW + DAY)


def reason(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(MessageError) as caught:
        call(*arguments)
    assert caught.value.remedy
    return caught.value.reason


def replaced(raw: bytes, **changes: object) -> bytes:
    """An envelope with other fields."""
    return encode(msgspec.structs.replace(decode(raw, Envelope), **changes))


# --- credentials --------------------------------------------------------------------------------------------------


def test_a_credential_of_the_fleets_authority_is_read() -> None:
    assert read_credential(issue(CREDENTIAL, AUTHORITY), TRUST) == CREDENTIAL


def test_during_a_rotation_either_key_counts() -> None:
    both = msgspec.structs.replace(TRUST, authorities=(OTHER.public, AUTHORITY.public))
    assert read_credential(issue(CREDENTIAL, AUTHORITY), both) == CREDENTIAL
    assert read_credential(issue(CREDENTIAL, OTHER), both) == CREDENTIAL


def test_another_authority_does_not_count_whatever_key_it_claims_to_have() -> None:
    raw = issue(CREDENTIAL, OTHER)
    assert reason(read_credential, raw, TRUST) == "unknown-authority"
    claimed = replaced(raw, key=key_id(AUTHORITY.public))
    assert reason(read_credential, claimed, TRUST) == "wrong-signature"


def test_a_device_issues_no_credentials() -> None:
    assert reason(read_credential, issue(CREDENTIAL, DEVICE), TRUST) == "unknown-authority"


def test_a_credential_of_another_fleet_does_not_count_even_if_one_authority_leads_both() -> None:
    raw = issue(msgspec.structs.replace(CREDENTIAL, fleet="plant"), AUTHORITY)
    assert reason(read_credential, raw, TRUST) == "wrong-fleet"


@pytest.mark.parametrize("field", ["fleet", "role", "name", "key", "begins", "expires"])
def test_nothing_of_a_credential_may_change(field: str) -> None:
    others = Credential("plant", "aggregator", "nano-2", OTHER.public, NOW - DAY, NOW + 99 * DAY)
    changed = msgspec.structs.replace(CREDENTIAL, **{field: getattr(others, field)})
    raw = replaced(issue(CREDENTIAL, AUTHORITY), body=msgspec.Raw(encode(changed)))
    assert reason(read_credential, raw, TRUST) == "wrong-signature"


@pytest.mark.parametrize("raw", [
    b"", b"null", b"{}", b"[" * 10_000, b'{"body":{}}', issue(CREDENTIAL, AUTHORITY)[:-9],
])  # fmt: skip
def test_what_is_no_credential_is_refused(raw: bytes) -> None:
    assert reason(read_credential, raw, TRUST) in ("malformed", "unknown-authority")


def test_a_credential_without_a_signature_is_refused() -> None:
    raw = issue(CREDENTIAL, AUTHORITY)
    assert reason(read_credential, replaced(raw, signature=None), TRUST) == "wrong-signature"
    assert reason(read_credential, replaced(raw, key=None), TRUST) == "unknown-authority"


def test_a_credential_that_is_too_large_is_not_parsed() -> None:
    raw = issue(CREDENTIAL, AUTHORITY)
    assert reason(read_credential, raw + b" " * MAX_MESSAGE, TRUST) == "message-too-large"


@pytest.mark.parametrize("body", [
    b'{"fleet":"lab","role":"root","name":"a","key":"K","begins":1,"expires":2}',
    b'{"fleet":"lab","role":"device","name":"a/b","key":"K","begins":1,"expires":2}',
    b'{"fleet":"lab","role":"device","name":"a","key":"rsa:K","begins":1,"expires":2}',
    b'{"fleet":"lab","role":"device","name":"a","key":"K","begins":-1,"expires":2}',
    b'{"fleet":"lab","role":"device","name":"a","key":"K","begins":1,"expires":1e300}',
    b'{"fleet":"lab","role":"device","name":"a","key":"K","begins":1,"expires":2,"admin":true}',
])  # fmt: skip
def test_an_authority_cannot_sign_nonsense(body: bytes) -> None:
    body = body.replace(b'"K"', b'"%b"' % DEVICE.public.encode())
    signature = AUTHORITY.sign(signed_bytes("credential", body))
    raw = encode(Envelope(body=msgspec.Raw(body), key=key_id(AUTHORITY.public), signature=signature))
    assert reason(read_credential, raw, TRUST) == "malformed"


# --- time and revocation ------------------------------------------------------------------------------------------


def test_a_credential_counts_until_it_expires_and_as_long_as_clocks_may_differ() -> None:
    check_current(CREDENTIAL, TRUST, NOW)
    check_current(CREDENTIAL, TRUST, CREDENTIAL.expires + MAX_SKEW - 1)
    assert reason(check_current, CREDENTIAL, TRUST, CREDENTIAL.expires + MAX_SKEW + 1) == "expired-credential"


def test_revocation_covers_what_was_issued_until_then() -> None:
    revoked = msgspec.structs.replace(TRUST, revoked={"nano-1": NOW + 10})
    at = {begins: msgspec.structs.replace(CREDENTIAL, begins=begins) for begins in (NOW, NOW + 10, NOW + 10.001)}
    assert reason(check_current, at[NOW], revoked, NOW + 20) == "revoked"
    assert reason(check_current, at[NOW + 10], revoked, NOW + 20) == "revoked"
    check_current(at[NOW + 10.001], revoked, NOW + 20)
    check_current(msgspec.structs.replace(CREDENTIAL, name="nano-2"), revoked, NOW + 20)


def test_one_that_is_revoked_and_has_expired_is_called_revoked() -> None:
    revoked = msgspec.structs.replace(TRUST, revoked={"nano-1": NOW})
    assert reason(check_current, CREDENTIAL, revoked, NOW + 99 * DAY) == "revoked"


# --- trust documents ----------------------------------------------------------------------------------------------


def test_a_trust_document_is_read_if_the_one_before_names_its_signer() -> None:
    raw = sign_trust(TRUST, AUTHORITY)
    assert read_trust(raw, (OTHER.public, AUTHORITY.public), "lab") == TRUST
    assert reason(read_trust, raw, (OTHER.public,), "lab") == "unknown-authority"
    assert reason(read_trust, raw, (AUTHORITY.public,), "plant") == "wrong-fleet"


def test_a_trust_document_cannot_speak_for_itself() -> None:
    """Whoever signs one that names themselves is nobody to those who believe somebody else."""
    raw = sign_trust(msgspec.structs.replace(TRUST, version=9, authorities=(OTHER.public,)), OTHER)
    assert reason(read_trust, raw, TRUST.authorities, "lab") == "unknown-authority"


@pytest.mark.parametrize("changes", [{"version": 0}, {"authorities": ()}, {"authorities": ("x",)}, {"roots": "x"}])
def test_a_trust_document_that_trusts_nobody_is_malformed(changes: dict[str, object]) -> None:
    raw = sign_trust(msgspec.structs.replace(TRUST, **changes), AUTHORITY)
    assert reason(read_trust, raw, (AUTHORITY.public,), "lab") == "malformed"


def test_a_trust_document_that_does_not_fit_a_message_is_not_made() -> None:
    names = {f"device-{i:05}": NOW for i in range(4000)}
    with pytest.raises(MessageError, match="exceeds 65536") as caught:
        sign_trust(msgspec.structs.replace(TRUST, revoked=names), AUTHORITY)
    assert "replace the authority's key" in caught.value.remedy


# --- what a signature covers --------------------------------------------------------------------------------------

CONTEXTS = ["credential", "trust", "possession", "ft/1/lab/up/nano-1/renew", "ft/1/lab/up/nano-2/renew"]


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(CONTEXTS, 2)))
def test_what_was_signed_as_one_thing_is_not_taken_for_another(one: str, other: str) -> None:
    raw = sign(one, Ack("u", accepted=True), AUTHORITY)
    assert read_signed(one, raw, Ack, (AUTHORITY.public,)) == Ack("u", accepted=True)
    assert reason(read_signed, other, raw, Ack, (AUTHORITY.public,)) == "wrong-signature"


def test_a_trust_document_is_not_taken_for_a_credential() -> None:
    assert reason(read_credential, sign_trust(TRUST, AUTHORITY), TRUST) == "wrong-signature"
    assert reason(read_trust, issue(CREDENTIAL, AUTHORITY), (AUTHORITY.public,), "lab") == "wrong-signature"


def test_whatever_is_signed_is_not_parsed_before_the_signature_is_verified() -> None:
    raw = encode(Envelope(body=msgspec.Raw(b'{"no":"ack"}'), key=key_id(AUTHORITY.public), signature=bytes(64)))
    assert reason(read_signed, "t", raw, Ack, (AUTHORITY.public,)) == "wrong-signature"
    assert reason(check_signature, "t", decode(raw, Envelope), AUTHORITY.public) == "wrong-signature"


@example("trust", b"credential{}", "trustcredential", b"{}")
@given(st.text("ab/\n"), st.binary(max_size=6), st.text("ab/\n"), st.binary(max_size=6))
def test_no_two_contexts_and_bodies_are_signed_alike(one: str, body: bytes, other: str, another: bytes) -> None:
    """Topics and kinds have no line breaks."""
    if (one, body) != (other, another) and "\n" not in one + other:
        assert signed_bytes(one, body) != signed_bytes(other, another)
