"""The folder of an identity: what is refused, who may read what, and what never shows."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fleetune.edge.protocol.errors import IdentityError, KeyExposedError
from fleetune.edge.protocol.identity.credential import sign_trust
from fleetune.edge.protocol.identity.folder import FILE, ROOTS_FILE, TLS_FILE, read_identity, write_private
from fleetune.edge.protocol.identity.keys import SeedSigner
from fleetune.edge.protocol.identity.tls import client_context
from fleetune.edge.protocol.messages import MAX_MESSAGE
from support.guarded import GuardedFleet


@pytest.fixture
def folder(lab: GuardedFleet, tmp_path: Path) -> Path:
    lab.copy("nano-1", tmp_path / "identity")
    return tmp_path / "identity"


def change(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    document = json.loads((folder / FILE).read_text())
    edit(document)
    (folder / FILE).write_text(json.dumps(document, separators=(",", ":")))  # as it was: signatures cover the bytes


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_identity_is_read_as_it_was_made(folder: Path) -> None:
    identity = read_identity(folder)
    credential = identity.credential
    assert (credential.fleet, credential.role, credential.name) == ("lab", "device", "nano-1")
    assert identity.signer.public == credential.key
    assert identity.trust.fleet == "lab"


def test_what_holds_a_key_is_its_owners_alone_whatever_the_umask(lab: GuardedFleet, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "new" / "key", b"secret")
        identity = lab.copy("nano-1", tmp_path / "identity")
        for path in (tmp_path / "identity").iterdir():
            path.unlink()
        identity.save()
    finally:
        os.umask(before)
    assert mode(tmp_path / "new" / "key") == mode(tmp_path / "identity" / FILE) == 0o600
    assert mode(tmp_path / "new") == 0o700


@pytest.mark.parametrize("file", [FILE, TLS_FILE])
@pytest.mark.parametrize("others", [0o640, 0o604, 0o644, 0o620, 0o602, 0o610, 0o777])
def test_a_key_that_others_may_read_or_change_is_refused(folder: Path, file: str, others: int) -> None:
    (folder / file).chmod(others)
    with pytest.raises(KeyExposedError, match=f"{folder / file} holds a private key.*mode {others:04o}") as caught:
        read_identity(folder)
    assert caught.value.exit_code == 25
    assert f"chmod 600 {folder / file}" in caught.value.remedy


def test_a_key_for_tls_is_looked_at_before_each_connection(folder: Path) -> None:
    client_context(folder)
    (folder / TLS_FILE).chmod(0o644)
    with pytest.raises(KeyExposedError):
        client_context(folder)


def test_a_stricter_mode_is_fine(folder: Path) -> None:
    (folder / FILE).chmod(0o400)
    assert read_identity(folder).credential.name == "nano-1"


def test_a_link_does_not_hide_what_it_points_to(folder: Path) -> None:
    (folder / FILE).rename(folder / "elsewhere")
    (folder / "elsewhere").chmod(0o644)
    (folder / FILE).symlink_to(folder / "elsewhere")
    with pytest.raises(KeyExposedError):
        read_identity(folder)


def test_a_link_is_replaced_and_what_it_points_to_is_not_written(tmp_path: Path) -> None:
    """Whoever can put a link where a key goes does not get the key."""
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "key").symlink_to(tmp_path / "theirs")
    write_private(tmp_path / "key", b"secret")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "key").read_text() == "secret"
    assert not (tmp_path / "key").is_symlink()


def test_no_identity_is_said_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=f"{tmp_path} holds no identity: {FILE} is missing") as caught:
        read_identity(tmp_path)
    assert caught.value.exit_code == 26
    assert "fleetune enroll" in caught.value.remedy


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "\x00", '{"schema":1}', "[" * 100_000])
def test_a_damaged_file_is_named(folder: Path, content: str) -> None:
    (folder / FILE).write_text(content)
    with pytest.raises(IdentityError, match=f"{folder / FILE} is damaged"):
        read_identity(folder)


def test_no_more_of_a_file_is_read_than_an_identity_has(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(IdentityError, match="is larger than 192 KiB"):
        read_identity(folder)


def test_a_newer_schema_is_said_as_such(folder: Path) -> None:
    change(folder, lambda document: document.update(schema=2))
    with pytest.raises(IdentityError, match="has schema 2") as caught:
        read_identity(folder)
    assert "newer Fleetune" in caught.value.remedy


def test_a_credential_of_another_authority_is_refused(lab: GuardedFleet, folder: Path) -> None:
    raw, _ = lab.forge("device", "nano-1", by=SeedSigner.generate())
    change(folder, lambda document: document.update(credential=json.loads(raw)))
    with pytest.raises(IdentityError, match="no authority of the fleet signed"):
        read_identity(folder)


def test_a_credential_for_another_key_is_refused(lab: GuardedFleet, folder: Path) -> None:
    raw, _ = lab.forge("device", "nano-1")
    change(folder, lambda document: document.update(credential=json.loads(raw)))
    with pytest.raises(IdentityError, match="the credential is for another key"):
        read_identity(folder)


@pytest.mark.parametrize("edit", [
    lambda document: document["credential"]["body"].update(name="nano-2"),
    lambda document: document["credential"]["body"].update(expires=2**40),
    lambda document: document["trust"]["body"].update(version=99),
    lambda document: document["trust"]["body"].update(revoked={}, roots=[]),
])  # fmt: skip
def test_what_was_signed_cannot_be_edited(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    change(folder, dict)  # which changes nothing
    read_identity(folder)
    change(folder, edit)
    with pytest.raises(IdentityError, match="the signature does not fit"):
        read_identity(folder)


@pytest.mark.parametrize("key", ["", "ed25519:", "ed25519:QUJD", "rsa:QUJD", "ed25519:!!!"])
def test_a_key_that_is_none_is_refused_without_being_repeated(folder: Path, key: str) -> None:
    change(folder, lambda document: document.update(key=key))
    with pytest.raises(IdentityError) as caught:
        read_identity(folder)
    assert "QUJD" not in str(caught.value)


def test_an_identity_does_not_show_its_key(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = read_identity(folder)
    secret = json.loads((folder / FILE).read_text())["key"].removeprefix("ed25519:")
    assert identity.key.endswith(secret)
    shown = f"{identity} {identity!r} {[identity]} {vars(identity)['signer']}"
    assert secret not in shown
    assert "nano-1" in repr(identity)


def test_an_error_about_a_file_does_not_show_its_key(folder: Path) -> None:
    secret = json.loads((folder / FILE).read_text())["key"].removeprefix("ed25519:")
    for edit in (
        lambda document: document.update(schema="1"),
        lambda document: document.update(key=document["key"][:-2]),
        lambda document: document.update(credential=None),
        lambda document: document.update(more=1),
    ):
        change(folder, edit)
        with pytest.raises(IdentityError) as caught:
            read_identity(folder)
        assert secret[:12] not in f"{caught.value} {caught.value.__cause__!r}"


def test_the_largest_trust_document_fits(lab: GuardedFleet, folder: Path) -> None:
    identity = read_identity(folder)
    names = {f"device-{i:05}": 1_800_000_000.123 for i in range(2100)}
    raw = sign_trust(msgspec.structs.replace(identity.trust, version=2, revoked=names), lab.authority.signer)
    assert len(raw) > 0.9 * MAX_MESSAGE
    dataclasses.replace(identity, trust_envelope=raw).save()
    assert len(read_identity(folder).trust.revoked) == 2100
    assert (folder / ROOTS_FILE).exists()
