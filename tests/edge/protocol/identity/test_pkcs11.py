"""Signing keys in hardware tokens, on SoftHSM: Ed25519 where the token has it, P-256 where it has not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.edge.protocol.errors import ConfigError, IdentityError, KeyExposedError
from fleetune.edge.protocol.identity.credential import Sender
from fleetune.edge.protocol.identity.folder import FILE
from fleetune.edge.protocol.identity.keys import verifies
from fleetune.edge.protocol.messages import Ack
from support.guarded import PIN, SOFTHSM, GuardedFleet, SoftToken

pkcs11 = pytest.importorskip("pkcs11", reason="needs python-pkcs11: pip install 'fleetune[pkcs11]'")

from fleetune.edge.protocol.identity.pkcs11 import TokenKey, TokenSigner  # noqa: E402 - it needs the package


def session_of(token: SoftToken) -> Any:
    """One of this process, which has logged in for all."""
    TokenSigner(token.uri("first"), create=True)
    return pkcs11.lib(str(SOFTHSM)).get_token(token_label=token.label).open(rw=True)


def elsewhere(code: str, *arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its settings once, and whoever has logged in needs no PIN again."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from {TokenSigner.__module__} import TokenSigner; {code}", *arguments],
        env={**os.environ, "SOFTHSM2_CONF": str(config or os.environ["SOFTHSM2_CONF"])},
        capture_output=True,
        text=True,
        check=False,
    )


def make_p256(token: SoftToken, name: str) -> None:
    """As a TPM does, which has no Edwards curves."""
    from pkcs11.util.ec import encode_named_curve_parameters

    with session_of(token) as session:
        named = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        session.create_domain_parameters(pkcs11.KeyType.EC, named, local=True).generate_keypair(store=True, label=name)


# --- addresses ----------------------------------------------------------------------------------------------------


def test_an_address_is_read_as_rfc_7512_has_it() -> None:
    uri = "pkcs11:token=my%20tpm;object=nano-1;type=private?module-path=/usr/lib/x.so&pin-source=file:/etc/pin"
    assert TokenKey.parse(uri) == TokenKey("my tpm", "nano-1", Path("/usr/lib/x.so"), Path("/etc/pin"))
    assert TokenKey.parse("pkcs11:object=a;token=b?module-path=/x.so") == TokenKey("b", "a", Path("/x.so"), None)


@pytest.mark.parametrize("uri", [
    "", "nano-1", "pkcs11:", "pkcs11:token=a;object=b", "pkcs11:object=b?module-path=/x",
    "pkcs11:token=a?module-path=/x", "http:token=a;object=b?module-path=/x",
])  # fmt: skip
def test_an_address_that_lacks_something_is_refused_with_an_example(uri: str) -> None:
    with pytest.raises(ConfigError, match="does not name a key in a token") as caught:
        TokenKey.parse(uri)
    assert "pkcs11:token=NAME;object=NAME?module-path=" in caught.value.remedy


def test_a_pin_in_an_address_is_refused_without_being_repeated() -> None:
    """It would stand in process lists, in identity.json and in every error."""
    with pytest.raises(ConfigError, match="the key 'nano-1' names a PIN") as caught:
        TokenKey.parse(f"pkcs11:token=a;object=nano-1?module-path=/x.so&pin-value={PIN}")
    assert PIN not in str(caught.value)
    assert "pin-source=file:" in caught.value.remedy


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_key_is_made_in_the_token_once(soft_token: SoftToken) -> None:
    uri = soft_token.uri("made-once")
    made = TokenSigner(uri, create=True)
    assert made.public.startswith("ed25519:")
    assert TokenSigner(uri, create=True).public == TokenSigner(uri).public == made.public
    assert verifies(made.public, made.sign(b"data"), b"data")
    assert not verifies(made.public, made.sign(b"data"), b"other")


def test_two_keys_of_a_token_sign_at_once_and_one_goes_on_when_the_other_ends(soft_token: SoftToken) -> None:
    """A renewed identity opens the same key again, and then lets go of the one before."""
    one, other = (TokenSigner(soft_token.uri(name), create=True) for name in ("one", "other"))
    again = TokenSigner(soft_token.uri("one"))
    assert again.public == one.public != other.public
    del one, other
    gc.collect()
    assert verifies(again.public, again.sign(b"data"), b"data")


def test_a_key_does_not_leave_the_token(soft_token: SoftToken) -> None:
    TokenSigner(soft_token.uri("stays"), create=True)
    with session_of(soft_token) as session:
        private = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label="stays")
        assert private[pkcs11.Attribute.SENSITIVE]
        assert not private[pkcs11.Attribute.EXTRACTABLE]
        with pytest.raises(pkcs11.PKCS11Error):
            private[pkcs11.Attribute.VALUE]


def test_a_token_without_ed25519_signs_on_p256(soft_token: SoftToken) -> None:
    make_p256(soft_token, "tpm")
    signer = TokenSigner(soft_token.uri("tpm"))
    assert signer.public.startswith("p256:")
    assert verifies(signer.public, signer.sign(b"data"), b"data")
    assert not verifies(signer.public, signer.sign(b"data"), b"other")


def test_such_a_token_gets_a_key_that_it_can_make(soft_token: SoftToken, tmp_path: Path) -> None:
    settings = Path(os.environ["SOFTHSM2_CONF"]).read_text() + "slots.mechanisms = CKM_EC_KEY_PAIR_GEN,CKM_ECDSA\n"
    (tmp_path / "softhsm2.conf").write_text(settings)
    code, uri = "print(TokenSigner(sys.argv[1], create=True).public)", soft_token.uri("made-by-a-tpm")
    assert elsewhere(code, uri, config=tmp_path / "softhsm2.conf").stdout.startswith("p256:")
    signer = TokenSigner(soft_token.uri("made-by-a-tpm"))
    assert verifies(signer.public, signer.sign(b"data"), b"data")


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_key_that_is_not_there_is_not_made_unasked(soft_token: SoftToken) -> None:
    with pytest.raises(IdentityError, match="holds no key of this name"):
        TokenSigner(soft_token.uri("nobody"))


def test_what_the_token_says_is_told_without_the_pin(soft_token: SoftToken, tmp_path: Path) -> None:
    wrong = tmp_path / "pin"
    wrong.write_text("0815-wrong")
    wrong.chmod(0o600)
    uri = soft_token.uri("x").replace(str(soft_token.pin_file), str(wrong))
    done = elsewhere("TokenSigner(sys.argv[1])", uri)
    assert "IdentityError" in done.stderr
    assert "PinIncorrect" in done.stderr
    assert "0815-wrong" not in done.stderr


def test_a_key_that_wants_a_pin_is_not_there_without_one(soft_token: SoftToken) -> None:
    TokenSigner(soft_token.uri("wants-pin"), create=True)
    done = elsewhere("TokenSigner(sys.argv[1])", soft_token.uri("wants-pin", pin=False))
    assert "IdentityError" in done.stderr.splitlines()[-1]
    assert elsewhere("TokenSigner(sys.argv[1])", soft_token.uri("wants-pin")).returncode == 0


@pytest.mark.parametrize("other", ["token=nowhere", "module-path=/nowhere.so"])
def test_a_token_or_a_module_that_is_not_there_is_said(soft_token: SoftToken, other: str) -> None:
    name = other.partition("=")[0]
    uri = soft_token.uri("x")
    here = f"token={soft_token.label}" if name == "token" else f"module-path={SOFTHSM}"
    with pytest.raises(IdentityError, match="nowhere"):
        TokenSigner(uri.replace(here, other))


def test_a_pin_that_others_may_read_is_refused(soft_token: SoftToken, tmp_path: Path) -> None:
    exposed = tmp_path / "pin"
    exposed.write_text(PIN)
    exposed.chmod(0o644)
    with pytest.raises(KeyExposedError) as caught:
        TokenSigner(soft_token.uri("x").replace(str(soft_token.pin_file), str(exposed)))
    assert caught.value.exit_code == 25
    assert PIN not in str(caught.value)


def test_a_file_that_is_too_large_for_a_pin_is_not_read(soft_token: SoftToken, tmp_path: Path) -> None:
    large = tmp_path / "pin"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    large.chmod(0o600)
    with pytest.raises(IdentityError, match="too large for a PIN"):
        TokenSigner(soft_token.uri("x").replace(str(soft_token.pin_file), str(large)))


# --- members whose keys are in a token ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_a_device_with_a_token_is_a_member_like_any_other(
    fleet: GuardedFleet, soft_token: SoftToken, kind: str
) -> None:
    uri = soft_token.uri(f"member-{kind}")
    make_p256(soft_token, f"member-{kind}") if kind == "p256" else TokenSigner(uri, create=True)
    identity = fleet.enrol("nano-1", key=uri)
    assert identity.credential.key.startswith(f"{kind}:")
    content = (fleet.home("nano-1") / FILE).read_text()
    assert '"key":"pkcs11:' in content
    assert PIN not in content + repr(identity.signer)
    device, aggregator, nano_1 = fleet.seals("nano-1"), fleet.seals("aggregator"), Sender("device", "nano-1")
    aggregator.meet(device.introduction, nano_1)
    raw = device.seal("t", Ack("u", accepted=True))
    assert aggregator.open("t", raw, Ack, nano_1) == Ack("u", accepted=True)
