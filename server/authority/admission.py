"""Who gets in: requests with a token, and requests to renew, each checked and answered."""

from __future__ import annotations

import logging

import msgspec

from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.identity.credential import sign, signed_bytes
from fleetune.edge.protocol.identity.enrolment import (
    POSSESSION,
    CredentialReply,
    CredentialRequest,
    Refusal,
    Token,
    authenticate,
    read_authenticated,
)
from fleetune.edge.protocol.identity.keys import key_id, verifies
from fleetune.edge.protocol.messages import decode
from fleetune.server.authority.authority import Authority
from fleetune.server.authority.x509 import CertificateKey, read_csr

log = logging.getLogger(__name__)

_IN_WORDS: dict[Refusal, str] = {
    "used-token": "the token was used for another key; if that was not this device, revoke it",
    "expired-token": "the token has expired",
    "wrong-device": "the token or credential is another device's",
    "no-possession": "it does not show that it has the keys",
}


class Admission:
    """Decides for an authority.

    Args:
        authority: What it issues from.
    """

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    def enrol(self, token_id: str, raw: bytes) -> bytes:
        """Answer a request with a token.

        Raises:
            MessageError: Nobody handed out the token (``unknown-token``), or whoever asks does not know its secret:
                there is nobody to answer.
        """
        known = self._authority.ledger.token(token_id)
        if known is None:
            raise MessageError(
                f"the token {token_id} is not known here",
                "make one with `fleetune fleet enroll`",
                reason="unknown-token",
            )
        row, kept = known
        token = decode(kept, Token)
        request = read_authenticated(raw, token, CredentialRequest, "request")
        refused, certificate_key = self._check(request, row.device)
        if not refused and self._authority.now() > row.expires:
            refused = "expired-token"
        if not refused and not self._authority.ledger.use_token(token_id, request.key, self._authority.now()):
            refused = "used-token"
        if refused:
            log.warning("%s: enrolment is refused: %s", row.device, _IN_WORDS[refused])
            return authenticate(CredentialReply(refused), token, "reply")
        log.info("%s: enrolled with key %s", row.device, key_id(request.key))
        return authenticate(self._grant(request, certificate_key), token, "reply")

    def renew(self, topic: str, device: str, request: CredentialRequest) -> bytes:
        """Answer a request that the device's current credential has signed.

        Args:
            topic: Where the answer goes.
            device: Who has signed it.
            request: What it asks for.
        """
        refused, certificate_key = self._check(request, device)
        if refused:
            log.warning("%s: renewal is refused: %s", device, _IN_WORDS[refused])
            return sign(topic, CredentialReply(refused), self._authority.signer)
        log.info("%s: renewed with key %s", device, key_id(request.key))
        return sign(topic, self._grant(request, certificate_key), self._authority.signer)

    def _check(self, request: CredentialRequest, device: str) -> tuple[Refusal, CertificateKey | None]:
        if request.device != device:
            return "wrong-device", None
        if not verifies(request.key, request.possession, signed_bytes(POSSESSION, request.csr.encode())):
            return "no-possession", None
        try:
            return "", read_csr(request.csr)
        except ValueError as error:
            log.warning("%s: its certificate signing request does not count: %s", device, error)
            return "no-possession", None

    def _grant(self, request: CredentialRequest, certificate_key: CertificateKey | None) -> CredentialReply:
        issued = self._authority.issue("device", request.device, request.key, certificate_key)
        return CredentialReply(
            credential=msgspec.Raw(issued.credential),
            trust=msgspec.Raw(self._authority.trust_envelope),
            certificates=issued.certificates,
        )
