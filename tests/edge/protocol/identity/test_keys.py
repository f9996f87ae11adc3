"""Keys: what they verify, what they refuse, and that they never show themselves."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from fleetune.edge.protocol.identity.keys import SeedSigner, key_id, verifies

ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of Ed25519's group."""


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_signature_is_ed25519_as_rfc_8032_has_it() -> None:
    """Section 7.1, test 2."""
    signer = SeedSigner(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert signer.public == "ed25519:" + b64(
        bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    )
    assert signer.sign(b"\x72") == bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_signature_verifies_with_its_own_key_and_data_alone() -> None:
    signer, other = SeedSigner.generate(), SeedSigner.generate()
    signature = signer.sign(b"data")
    assert verifies(signer.public, signature, b"data")
    assert not verifies(other.public, signature, b"data")
    assert not verifies(signer.public, signature, b"Data")
    assert not verifies(signer.public, signature, b"")


def test_no_bit_of_a_signature_may_change() -> None:
    signer = SeedSigner(bytes(32))
    signature = signer.sign(b"data")
    for bit in range(512):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert not verifies(signer.public, bytes(changed), b"data"), bit


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length_does_not_verify(length: int) -> None:
    signer = SeedSigner.generate()
    assert not verifies(signer.public, (signer.sign(b"data") * 2)[:length], b"data")


def test_a_second_form_of_a_signature_does_not_verify() -> None:
    """S plus the group's order satisfies the equation, too; whoever takes it lets anybody alter a signature."""
    signer = SeedSigner.generate()
    signature = signer.sign(b"data")
    other = int.from_bytes(signature[32:], "little") + ORDER
    assert not verifies(signer.public, signature[:32] + other.to_bytes(32, "little"), b"data")


@pytest.mark.parametrize("point", [b"\x01" + bytes(31), bytes(32), b"\xec" + b"\xff" * 30 + b"\x7f"])
def test_a_key_that_fits_every_signature_fits_none(point: bytes) -> None:
    """A point of small order: with it as the key and the neutral element as R, S = 0 signs anything."""
    assert not verifies("ed25519:" + b64(point), b"\x01" + bytes(63), b"anything")


# --- P-256 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tpm() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public(key: ec.EllipticCurvePrivateKey) -> str:
    point = serialization.PublicFormat.UncompressedPoint
    return "p256:" + b64(key.public_key().public_bytes(serialization.Encoding.X962, point))


def sign_p256(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def test_a_key_without_ed25519_is_verified_with_ecdsa(tpm: ec.EllipticCurvePrivateKey) -> None:
    signature = sign_p256(tpm, b"data")
    assert verifies(public(tpm), signature, b"data")
    assert not verifies(public(tpm), signature, b"Data")
    assert not verifies(public(tpm), signature[:-1], b"data")
    assert not verifies(public(ec.generate_private_key(ec.SECP256R1())), signature, b"data")


@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64, bytes(32) + b"\x01" * 32, b"\x01" * 32 + bytes(32)])
def test_signatures_out_of_range_do_not_verify(tpm: ec.EllipticCurvePrivateKey, signature: bytes) -> None:
    """The one that Java once took for any data is r = s = 0."""
    assert not verifies(public(tpm), signature, b"data")


@pytest.mark.parametrize("point", [b"\x04" + bytes(64), b"\x04" + b"\x01" * 64, b"\x02" * 65, bytes(65)])
def test_a_point_that_is_not_on_the_curve_verifies_nothing(point: bytes) -> None:
    assert not verifies("p256:" + b64(point), b"\x01" * 64, b"data")


def test_one_algorithm_is_not_taken_for_the_other(tpm: ec.EllipticCurvePrivateKey) -> None:
    signer = SeedSigner.generate()
    assert not verifies(public(tpm), signer.sign(b"data"), b"data")
    assert not verifies(signer.public, sign_p256(tpm, b"data"), b"data")


# --- text -------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_from_its_text() -> None:
    signer = SeedSigner.generate()
    assert SeedSigner.parse(signer.text).public == signer.public
    assert SeedSigner.generate().public != signer.public


@pytest.mark.parametrize("change", [
    lambda text: text[:0],
    lambda text: text.removeprefix("ed25519:"),
    lambda text: text[:-1],
    lambda text: text[:-4],
    lambda text: text + text[-44:],
    lambda text: text.replace("ed25519:", "p256:"),
    lambda text: text.replace("ed25519:", "ed25519:ed25519:"),
    lambda text: text[:10] + "\n" + text[10:],
    lambda text: text[:10] + "é" + text[11:],
])  # fmt: skip
def test_what_is_no_private_key_is_refused_without_being_repeated(change: Callable[[str], str]) -> None:
    text = change(SeedSigner(b"\x5a" * 32).text)
    with pytest.raises(ValueError, match=r"\S") as caught:
        SeedSigner.parse(text)
    assert "WlpaWlpa" not in str(caught.value)


def test_a_private_key_does_not_show_itself(caplog: pytest.LogCaptureFixture) -> None:
    seed = bytes(range(100, 132))
    signer = SeedSigner(seed)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("x").info("%s %r %s", signer, signer, [signer])
    shown = f"{signer} {signer!r} {[signer]} {caplog.text}"
    for form in (b64(seed), seed.hex(), str(seed), b64(seed)[:10]):
        assert form not in shown
    assert key_id(signer.public) in repr(signer)


def test_the_id_of_a_key_is_half_a_hash_and_its_own() -> None:
    assert key_id("ed25519:x") == "d5e251ea8088aa4cb6f0e8444eef76cf"
    assert key_id(SeedSigner.generate().public) != key_id(SeedSigner.generate().public)
