"""Signed files: a pack, a release, an image. The signature lies beside the file and brings its credential along."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from fleetune.edge.protocol.errors import UNDECODABLE, MessageError, SignatureError
from fleetune.edge.protocol.files import write_atomic
from fleetune.edge.protocol.identity.credential import (
    PUBLISHER,
    Credential,
    Sender,
    Trust,
    UnixTime,
    check_signature,
    read_credential,
    sign,
)
from fleetune.edge.protocol.identity.folder import Identity
from fleetune.edge.protocol.identity.keys import key_id
from fleetune.edge.protocol.messages import MAX_MESSAGE, Envelope, Sha256, decode, encode

ENDING = ".sig"
"""What the name of a signature ends with, behind that of its file."""

PACK_FILE = "manifest.json"
"""The file of a pack that is signed: it has the hash of every other one."""

_CONTEXT = "file"
_FROM = Sender("publisher", PUBLISHER)


class SignedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is signed.

    Attributes:
        name: Of the file.
        size: In bytes.
        sha256: Of its bytes.
        issued: Unix time of the signature.
    """

    name: str
    size: int
    sha256: Sha256
    issued: UnixTime


class _Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    credential: msgspec.Raw
    signed: msgspec.Raw


def sign_file(path: Path, publisher: Identity, now: float) -> Path:
    """Sign a file, or a pack's folder.

    Args:
        path: The file, or the folder of a pack.
        publisher: Who signs.
        now: Unix time.

    Returns:
        The signature's file.

    Raises:
        SignatureError: It is neither a file nor a pack, or the identity is not a publisher's.
        OSError: It cannot be read, or the signature cannot be written.
    """
    if publisher.credential.sender != _FROM:
        who = f"{publisher.credential.role} {publisher.credential.name}"
        raise SignatureError(f"{who} does not publish", "name members/publisher of the authority's folder")
    file = _file(path)
    signed = SignedFile(file.name, *_measure(file), now)
    signature = _Signature(msgspec.Raw(publisher.envelope), msgspec.Raw(sign(_CONTEXT, signed, publisher.signer)))
    target = file.with_name(file.name + ENDING)
    write_atomic(target, encode(signature))
    return target


def check_file(path: Path, trust: Trust) -> SignedFile:
    """See that a file, or a pack's folder, is what the fleet's publisher has signed.

    Args:
        path: The file, or the folder of a pack.
        trust: Whom this machine believes.

    Raises:
        SignatureError: It is not signed, was altered, or somebody else has signed it.
        OSError: It cannot be read.
    """
    file = _file(path)
    target = file.with_name(file.name + ENDING)
    remedy = "get it again from who publishes for the fleet (`fleetune fleet sign`)"
    if not target.is_file():
        raise SignatureError(f"{path} is not signed: {target} is missing", remedy)
    if target.stat().st_size > MAX_MESSAGE:
        raise SignatureError(f"{target} is larger than {MAX_MESSAGE >> 10} KiB", remedy)
    try:
        signature = msgspec.json.decode(target.read_bytes(), type=_Signature)
        credential = read_credential(bytes(signature.credential), trust)
        signed = _read_signed(bytes(signature.signed), credential)
        _check_credential(credential, signed, trust)
    except UNDECODABLE as error:
        raise SignatureError(f"{target} is damaged: {error}", remedy) from error
    except MessageError as error:
        raise SignatureError(f"{target}: {error.what}", remedy) from error
    size, sha256 = _measure(file)
    if (signed.name, signed.size, signed.sha256) != (file.name, size, sha256):
        raise SignatureError(f"{file} is not what was signed", remedy)
    return signed


def _read_signed(raw: bytes, credential: Credential) -> SignedFile:
    envelope = decode(raw, Envelope)
    if envelope.key != key_id(credential.key):
        raise MessageError("signed with another key than its credential's", "none", reason="wrong-signature")
    check_signature(_CONTEXT, envelope, credential.key)
    return decode(bytes(envelope.body), SignedFile)


def _check_credential(credential: Credential, signed: SignedFile, trust: Trust) -> None:
    """See that the publisher's credential counted when it signed; what was signed then counts for good."""
    if credential.sender != _FROM:
        what = f"{credential.role} {credential.name} has signed it, who does not publish"
        raise MessageError(what, "none", reason="wrong-sender")
    if trust.revoked.get(credential.name, -1.0) >= credential.begins:
        raise MessageError("the publisher's credential is revoked", "none", reason="revoked")
    if not credential.begins <= signed.issued <= credential.expires:
        raise MessageError(
            "it was signed when the publisher's credential did not count", "none", reason="expired-credential"
        )


def _file(path: Path) -> Path:
    file = path / PACK_FILE if path.is_dir() else path
    if not file.is_file():
        raise SignatureError(f"{path} is neither a file nor a pack", "name a file, or the folder of a pack")
    return file


def _measure(file: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()
