"""A device with a token comes into its fleet."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from fleetune.edge.agent.application import Application
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.errors import EnrolmentError, IdentityError, MessageError
from fleetune.edge.protocol.identity.enrolment import (
    CredentialReply,
    Refusal,
    Token,
    authenticate,
    read_authenticated,
)
from fleetune.edge.protocol.identity.folder import FILE, Identity, read_identity
from fleetune.edge.protocol.identity.tls import enrolment_context
from fleetune.edge.protocol.link import Connected, Link, Received
from fleetune.edge.protocol.topics import Topics

log = logging.getLogger(__name__)

_ASK_AGAIN = 3.0
"""Seconds without an answer after which a request is sent again."""

_REFUSALS: dict[Refusal, tuple[str, str]] = {
    "expired-token": ("the token has expired", "make a new one with `fleetune fleet enroll`"),
    "used-token": (
        "the token was used already, for another key",
        "find out by whom; then `fleetune fleet revoke` and a new token",
    ),
    "wrong-device": ("the token is for another device", "use the token of this device"),
    "no-possession": (
        "the authority does not accept the keys",
        "see the authority's log",
    ),
}


def enrol(token: Token, folder: Path, *, key: str | None = None, timeout: float = 60.0) -> Identity:
    """Make keys here, and have the fleet's authority sign that they are this device's.

    Args:
        token: From `fleetune fleet enroll`.
        folder: Where the identity goes.
        key: Address of the signing key in a hardware token; made there if it is missing.
        timeout: Seconds in which the authority must answer.

    Returns:
        The identity, which is kept. One that the folder has already, for the same device and fleet, is replaced.

    Raises:
        EnrolmentError: The authority refuses, or does not answer.
        IdentityError: The folder holds another device's identity, or no key can be made.
        FleetuneError: The broker cannot be reached.
    """
    _check_held(folder, token)
    if key is not None:
        # Not at the top: it needs an extra.
        from fleetune.edge.protocol.identity.pkcs11 import TokenSigner

        TokenSigner(key, create=True)
    for private in (folder.parent, folder):  # the agent's state, and its identity in there
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
    application = Application(folder, token.device, token.id, key)
    request = authenticate(application.request, token, "request")
    topics, address = Topics(token.fleet), BrokerAddress.parse(token.broker)
    link = Link(
        address,
        token.id,
        subscriptions=[topics.enrolment(token.id, "reply")],
        context=enrolment_context,
        client_id=token.id,
    )
    link.connect()
    try:
        give_up, again = time.monotonic() + timeout, 0.0
        while time.monotonic() < give_up:
            for event in link.events(0.2):
                if isinstance(event, Received) and (reply := _read_reply(event.payload, token)) is not None:
                    return _accept(application, reply)
                if isinstance(event, Connected):
                    again = 0.0
            if time.monotonic() > again:
                again = time.monotonic() + _ASK_AGAIN
                link.publish(topics.enrolment(token.id, "request"), request)
    finally:
        link.close()
    raise EnrolmentError(
        f"nobody answers at {address} within {timeout:g} s",
        "see that `fleetune fleet serve` runs, with the authority that has made the token",
    )


def _check_held(folder: Path, token: Token) -> None:
    """See that a folder holds nobody else's identity; one that counts no more is there to be replaced."""
    if not (folder / FILE).exists():
        return
    try:
        held = read_identity(folder).credential
    except IdentityError as error:
        log.warning("%s; it is replaced", error.what)
        return
    if (held.fleet, held.name) != (token.fleet, token.device):
        raise IdentityError(
            f"{folder} holds the identity of {held.role} {held.name} of the fleet {held.fleet}",
            f"name another folder for {token.device} of {token.fleet}",
        )


def _read_reply(raw: bytes, token: Token) -> CredentialReply | None:
    try:
        return read_authenticated(raw, token, CredentialReply, "reply")
    except MessageError as error:  # of somebody who does not know the secret
        log.warning("a reply that does not count: %s", error)
        return None


def _accept(application: Application, reply: CredentialReply) -> Identity:
    if reply.refused:
        raise EnrolmentError(*_REFUSALS[reply.refused])
    try:
        return application.accept(reply, None)
    except MessageError as error:
        raise EnrolmentError(
            f"the authority's reply does not count: {error.what}", "see the authority's log"
        ) from error
