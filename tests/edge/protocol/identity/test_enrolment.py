"""Tokens, and the messages that they authenticate."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.protocol.errors import EnrolmentError, MessageError
from fleetune.edge.protocol.identity.enrolment import (
    MAX_TOKEN,
    CredentialReply,
    Token,
    authenticate,
    read_authenticated,
)
from fleetune.edge.protocol.messages import MAX_MESSAGE, Envelope, decode, encode

TOKEN = Token("lab", "nano-1", "ab" * 16, bytes(range(32)), "mqtts://localhost:8884", 1_800_000_000.0)
REPLY = CredentialReply("expired-token")


def test_a_token_comes_back_from_its_text() -> None:
    assert Token.parse(TOKEN.text) == Token.parse(f"  {TOKEN.text}\n") == TOKEN
    assert TOKEN.text.startswith("fleetune1.")
    assert TOKEN.text.isprintable()
    assert " " not in TOKEN.text


def test_no_two_tokens_are_alike() -> None:
    made = [Token.make("lab", "nano-1", broker="mqtts://b", expires=time.time()) for _ in range(8)]
    assert len({token.secret for token in made}) == len({token.id for token in made}) == 8


def test_the_longest_token_that_can_be_made_is_read() -> None:
    longest = Token("f" * 64, "d" * 64, "ab" * 16, bytes(32), "m" * 300, 2.0**40)
    assert len(longest.text) <= MAX_TOKEN
    assert Token.parse(longest.text) == longest


def rewritten(edit: Callable[[dict[str, object]], object]) -> str:
    body = TOKEN.text.removeprefix("fleetune1.")
    document = msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    edit(document)
    return "fleetune1." + base64.urlsafe_b64encode(msgspec.json.encode(document)).decode()


@pytest.mark.parametrize("text", [
    "",
    "fleetune1.",
    TOKEN.text.removeprefix("fleetune1."),
    TOKEN.text.replace("fleetune1.", "fleetune2."),
    TOKEN.text[:-1],
    TOKEN.text[:-10],
    TOKEN.text[:40] + TOKEN.text[41:],
    TOKEN.text + TOKEN.text,
    "fleetune1." + "A" * 3000,
    "fleetune1.é",
    "fleetune1.bnVsbA",
    "fleetune1." + base64.urlsafe_b64encode(b"[" * 1400).decode(),
    rewritten(lambda token: token.update(id="../../etc")),
    rewritten(lambda token: token.update(device="nano/1")),
    rewritten(lambda token: token.update(fleet="+")),
    rewritten(lambda token: token.update({"secret": "QUJD"})),
    rewritten(lambda token: token.update({"secret": ""})),
    rewritten(lambda token: token.update(broker="x" * 301)),
    rewritten(lambda token: token.update(admin=True)),
    rewritten(lambda token: token.pop("expires")),
])  # fmt: skip
def test_a_garbled_token_is_refused_with_how_to_copy_it(text: str) -> None:
    with pytest.raises(EnrolmentError, match="the token") as caught:
        Token.parse(text)
    assert caught.value.exit_code == 24
    assert "copy all of it" in caught.value.remedy


@given(st.text("AZaz09-_.={}é\n", max_size=80))
def test_whatever_the_text_only_an_enrolment_error_comes_out(text: str) -> None:
    for guess in (text, f"fleetune1.{text}"):
        with pytest.raises(EnrolmentError):
            Token.parse(guess)


def test_a_token_does_not_show_its_secret(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").info("%s %r", TOKEN, TOKEN)
    shown = f"{TOKEN} {TOKEN!r} {[TOKEN]} {caplog.text}"
    secret = base64.b64encode(TOKEN.secret).decode()
    for form in (secret[:12], str(TOKEN.secret)[2:20], TOKEN.secret.hex()[:12], TOKEN.text[10:40]):
        assert form not in shown


@pytest.mark.parametrize("edit", [
    lambda token: token.pop("device"),
    lambda token: token.update(fleet=1),
    lambda token: token.update(secret=token["secret"][:-4]),
])  # fmt: skip
def test_neither_does_the_error_of_a_garbled_one(edit: Callable[[dict[str, object]], object]) -> None:
    with pytest.raises(EnrolmentError) as caught:
        Token.parse(rewritten(edit))
    secret = base64.b64encode(TOKEN.secret).decode()
    assert secret[:8] not in f"{caught.value} {caught.value.__cause__!r}"


# --- what a token authenticates -----------------------------------------------------------------------------------


def reason(raw: bytes, token: Token = TOKEN, context: str = "reply") -> str:
    with pytest.raises(MessageError) as caught:
        read_authenticated(raw, token, CredentialReply, context)  # type: ignore[arg-type]
    return caught.value.reason


def test_a_message_is_read_by_whoever_has_the_same_token() -> None:
    assert read_authenticated(authenticate(REPLY, TOKEN, "reply"), TOKEN, CredentialReply, "reply") == REPLY


def test_whoever_does_not_know_the_secret_can_neither_ask_nor_answer() -> None:
    """The broker knows all the rest: fleet, device and the token's id."""
    guessed = msgspec.structs.replace(TOKEN, secret=bytes(32))
    assert reason(authenticate(REPLY, guessed, "reply")) == "wrong-signature"


def test_a_request_is_no_reply() -> None:
    assert reason(authenticate(REPLY, TOKEN, "request")) == "wrong-signature"
    assert reason(authenticate(REPLY, TOKEN, "reply"), context="request") == "wrong-signature"


def test_nothing_of_a_reply_may_change() -> None:
    raw = authenticate(REPLY, TOKEN, "reply")
    envelope = decode(raw, Envelope)
    granted = msgspec.Raw(bytes(envelope.body).replace(b"expired-token", b""))
    assert granted != envelope.body
    for changed in ({"body": granted}, {"signature": bytes(32)}, {"signature": b""}, {"signature": None}):
        assert reason(encode(msgspec.structs.replace(envelope, **changed))) == "wrong-signature"
    assert reason(raw + b" " * MAX_MESSAGE) == "message-too-large"
    assert reason(raw[:-3]) == "damaged"


def test_nothing_is_parsed_that_the_secret_does_not_authenticate() -> None:
    body = msgspec.Raw(b'{"refused":"because"}')
    assert reason(encode(Envelope(body=body, key=TOKEN.id, signature=bytes(32)))) == "wrong-signature"


def test_a_secret_does_not_travel() -> None:
    raw = authenticate(REPLY, TOKEN, "request")
    assert base64.b64encode(TOKEN.secret)[:12] not in raw
    assert TOKEN.secret not in raw
