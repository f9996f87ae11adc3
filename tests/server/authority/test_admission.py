"""Who gets in: what a request has to show, and what an attacker with a part of it gets."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.agent.application import Application
from fleetune.edge.agent.csr import make_csr
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import read_credential, read_signed, read_trust, signed_bytes
from fleetune.edge.protocol.identity.enrolment import (
    POSSESSION,
    CredentialReply,
    CredentialRequest,
    Refusal,
    Token,
    authenticate,
    read_authenticated,
)
from fleetune.edge.protocol.identity.keys import SeedSigner, key_id
from fleetune.server.authority.admission import Admission
from support.guarded import GuardedFleet


@pytest.fixture
def admission(fleet: GuardedFleet) -> Admission:
    return Admission(fleet.authority)


@pytest.fixture
def token(fleet: GuardedFleet) -> Token:
    return fleet.authority.make_token("nano-1", 1)


def request(
    device: str = "nano-1", signer: SeedSigner | None = None, *, csr: str = "", possession: bytes | None = None
) -> CredentialRequest:
    signer = signer or SeedSigner.generate()
    csr = csr or make_csr(device)[1]
    shown = signer.sign(signed_bytes(POSSESSION, csr.encode())) if possession is None else possession
    return CredentialRequest(device, signer.public, shown, csr)


def ask(admission: Admission, token: Token, asked: CredentialRequest) -> CredentialReply:
    raw = admission.enrol(token.id, authenticate(asked, token, "request"))
    return read_authenticated(raw, token, CredentialReply, "reply")


def members(fleet: GuardedFleet) -> list[str]:
    return [row.key for row in fleet.authority.ledger.members() if row.role == "device"]


# --- with a token -------------------------------------------------------------------------------------------------


def test_what_is_granted_is_all_that_a_device_needs(fleet: GuardedFleet, admission: Admission, token: Token) -> None:
    asked = request()
    reply = ask(admission, token, asked)
    assert reply.refused == ""
    trust = read_trust(bytes(reply.trust), fleet.authority.trust.authorities, "lab")
    credential = read_credential(bytes(reply.credential), trust)
    assert (credential.role, credential.name, credential.key) == ("device", "nano-1", asked.key)
    assert reply.certificates.startswith("-----BEGIN CERTIFICATE-----")
    assert members(fleet) == [key_id(asked.key)]


@pytest.mark.parametrize(("asked", "refused"), [
    (lambda: request("nano-2"), "wrong-device"),
    (lambda: request("aggregator"), "wrong-device"),
    (lambda: request(possession=bytes(64)), "no-possession"),
    (lambda: request(possession=SeedSigner.generate().sign(b"x")), "no-possession"),
    (lambda: request(csr="nonsense"), "no-possession"),
])  # fmt: skip
def test_what_a_request_does_not_show_is_not_granted_and_the_token_stays_good(
    fleet: GuardedFleet, admission: Admission, token: Token, asked: object, refused: Refusal
) -> None:
    reply = ask(admission, token, asked())  # type: ignore[operator]
    assert reply == CredentialReply(refused)
    assert members(fleet) == []
    assert ask(admission, token, request()).refused == ""


def test_a_key_that_somebody_else_has_is_not_granted(admission: Admission, token: Token) -> None:
    """Its possession was shown for another request."""
    owner = SeedSigner.generate()
    shown = request(signer=owner)
    stolen = CredentialRequest("nano-1", owner.public, shown.possession, make_csr("nano-1")[1])
    assert ask(admission, token, stolen).refused == "no-possession"


def test_a_token_is_used_once_and_by_the_same_key_again(
    fleet: GuardedFleet, admission: Admission, token: Token, caplog: pytest.LogCaptureFixture
) -> None:
    first = request()
    assert ask(admission, token, first).refused == ""
    assert ask(admission, token, request()).refused == "used-token"
    assert "if that was not this device, revoke it" in caplog.text
    assert ask(admission, token, first).refused == ""
    assert set(members(fleet)) == {key_id(first.key)}


def test_a_token_expires(fleet: GuardedFleet, admission: Admission, token: Token) -> None:
    used = request()
    fleet.clock.ahead = 3599.0
    assert ask(admission, token, used).refused == ""
    fleet.clock.ahead = 3601.0
    assert ask(admission, token, used).refused == "expired-token"
    assert ask(admission, token, request()).refused == "expired-token"


def test_whoever_does_not_know_the_secret_is_not_answered(admission: Admission, token: Token) -> None:
    guessed = msgspec.structs.replace(token, secret=bytes(32))
    for raw in (authenticate(request(), guessed, "request"), authenticate(request(), token, "reply"), b"", b"{}"):
        with pytest.raises(MessageError) as caught:
            admission.enrol(token.id, raw)
        assert caught.value.reason in ("wrong-signature", "damaged")


@pytest.mark.parametrize("token_id", ["", "0" * 32, "' OR 1=1 --", "nano-1", "é"])
def test_a_token_that_nobody_handed_out_is_not_answered(admission: Admission, token: Token, token_id: str) -> None:
    with pytest.raises(MessageError) as caught:
        admission.enrol(token_id, authenticate(request(), token, "request"))
    assert caught.value.reason == "unknown-token"


def test_a_revoked_device_is_not_let_in_again_with_the_token_that_it_used(
    fleet: GuardedFleet, admission: Admission, token: Token
) -> None:
    """Whoever has stolen the board has its key and, on its disk, the token; the broker has the very request."""
    asked = request()
    ask(admission, token, asked)
    fleet.authority.revoke("nano-1")
    with pytest.raises(MessageError) as caught:
        ask(admission, token, asked)
    assert caught.value.reason == "unknown-token"
    assert len(members(fleet)) == 1


def test_a_device_that_is_let_in_again_counts(fleet: GuardedFleet, admission: Admission, token: Token) -> None:
    ask(admission, token, request())
    fleet.authority.revoke("nano-1")
    reply = ask(admission, fleet.authority.make_token("nano-1", 1), request())
    trust = read_trust(bytes(reply.trust), fleet.authority.trust.authorities, "lab")
    credential = read_credential(bytes(reply.credential), trust)
    assert credential.begins > trust.revoked["nano-1"]


def test_no_secret_is_logged(admission: Admission, token: Token, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(admission, token, request())
        ask(admission, token, request("nano-2"))
    assert "nano-1" in caplog.text
    assert token.text[10:40] not in caplog.text
    assert token.secret.hex() not in caplog.text
    assert "PRIVATE" not in caplog.text


# --- with a credential --------------------------------------------------------------------------------------------


def test_a_renewal_is_for_the_device_that_asks(fleet: GuardedFleet, admission: Admission) -> None:
    asked = request()
    raw = admission.renew("t", "nano-1", asked)
    reply = read_signed("t", raw, CredentialReply, fleet.authority.trust.authorities)
    credential = read_credential(bytes(reply.credential), fleet.authority.trust)
    assert (credential.role, credential.name, credential.key) == ("device", "nano-1", asked.key)


@pytest.mark.parametrize(("asked", "refused"), [
    (lambda: request("nano-2"), "wrong-device"),
    (lambda: request(possession=bytes(64)), "no-possession"),
    (lambda: request(csr="nonsense"), "no-possession"),
])  # fmt: skip
def test_a_renewal_shows_as_much_as_an_enrolment(
    fleet: GuardedFleet, admission: Admission, asked: object, refused: Refusal
) -> None:
    raw = admission.renew("t", "nano-1", asked())  # type: ignore[operator]
    assert read_signed("t", raw, CredentialReply, fleet.authority.trust.authorities) == CredentialReply(refused)
    assert members(fleet) == []


def test_an_application_asks_for_what_is_granted(fleet: GuardedFleet, admission: Admission, tmp_path: Path) -> None:
    """The device's half and this one fit together."""
    token = fleet.authority.make_token("nano-1", 1)
    application = Application(tmp_path / "identity", "nano-1", token.id)
    identity = application.accept(ask(admission, token, application.request), None)
    assert identity.credential.key == application.request.key
