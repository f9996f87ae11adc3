"""Signed files: what the fleet's publisher has signed is taken, as it was signed, and nothing else is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.edge.protocol.errors import SignatureError
from fleetune.edge.protocol.identity.credential import Trust
from fleetune.edge.protocol.identity.folder import Identity
from fleetune.edge.protocol.identity.signature import ENDING, PACK_FILE, check_file, sign_file
from support.guarded import DAY, GuardedFleet, guarded_fleet


@pytest.fixture
def publisher(lab: GuardedFleet) -> Identity:
    return lab.identity("publisher")


@pytest.fixture
def image(tmp_path: Path, publisher: Identity) -> Path:
    """A file that is signed."""
    path = tmp_path / "image.img"
    path.write_bytes(bytes(range(256)) * 9000)
    assert sign_file(path, publisher, time.time()) == signature_of(path)
    return path


def signature_of(path: Path) -> Path:
    return path.with_name(path.name + ENDING)


def refused(path: Path, trust: Trust) -> str:
    with pytest.raises(SignatureError) as caught:
        check_file(path, trust)
    assert caught.value.exit_code == 29
    assert caught.value.remedy
    return caught.value.what


def test_a_signed_file_is_taken(image: Path, lab: GuardedFleet) -> None:
    signed = check_file(image, lab.identity("nano-1").trust)
    assert (signed.name, signed.size) == ("image.img", 256 * 9000)
    assert signed.issued == pytest.approx(time.time(), abs=60)


def test_a_pack_is_signed_by_its_manifest(tmp_path: Path, publisher: Identity) -> None:
    (tmp_path / PACK_FILE).write_text("{}")
    sign_file(tmp_path, publisher, time.time())
    assert check_file(tmp_path, publisher.trust).name == PACK_FILE
    (tmp_path / PACK_FILE).write_text("{ }")
    assert "manifest.json is not what was signed" in refused(tmp_path, publisher.trust)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda _: b"",
    ],
    ids=["shorter", "longer", "one bit", "empty"],
)
def test_an_altered_file_is_refused(change: Callable[[bytes], bytes], image: Path, publisher: Identity) -> None:
    image.write_bytes(change(image.read_bytes()))
    assert "image.img is not what was signed" in refused(image, publisher.trust)


def test_a_file_that_is_called_otherwise_is_refused(image: Path, publisher: Identity) -> None:
    """Or an old release could be passed off as a new one."""
    other = image.with_name("image-2.img")
    shutil.copy(image, other)
    shutil.copy(signature_of(image), signature_of(other))
    assert "image-2.img is not what was signed" in refused(other, publisher.trust)


def test_a_file_without_a_signature_is_refused(image: Path, publisher: Identity) -> None:
    signature_of(image).unlink()
    assert "is not signed" in refused(image, publisher.trust)


def test_what_is_neither_a_file_nor_a_pack_is_named(tmp_path: Path, publisher: Identity) -> None:
    assert "neither a file nor a pack" in refused(tmp_path, publisher.trust)
    assert "neither a file nor a pack" in refused(tmp_path / "nothing", publisher.trust)
    with pytest.raises(SignatureError, match="neither a file nor a pack"):
        sign_file(tmp_path, publisher, time.time())


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 5000, b"x" * (1 << 17), b'{"credential":1,"signed":2}'])
def test_a_signature_that_is_damaged_is_refused(raw: bytes, image: Path, publisher: Identity) -> None:
    signature_of(image).write_bytes(raw)
    assert str(signature_of(image)) in refused(image, publisher.trust)


def test_no_bit_of_a_signature_may_change(image: Path, publisher: Identity) -> None:
    raw = signature_of(image).read_bytes()
    for place in range(0, len(raw), 37):
        signature_of(image).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert refused(image, publisher.trust)


def test_a_device_cannot_publish(lab: GuardedFleet, image: Path, publisher: Identity) -> None:
    device = lab.identity("nano-1")
    with pytest.raises(SignatureError, match="device nano-1 does not publish"):
        sign_file(image, device, time.time())
    sign_file(image, replace(device, credential=publisher.credential), time.time())  # it does not ask
    assert "nano-1 has signed it, who does not publish" in refused(image, publisher.trust)


def test_nor_can_the_publisher_of_another_fleet(tmp_path: Path, image: Path, publisher: Identity) -> None:
    with guarded_fleet(tmp_path / "other") as other:
        sign_file(image, other.identity("publisher"), time.time())
        assert check_file(image, other.identity("publisher").trust)
    assert "no authority of the fleet signed it" in refused(image, publisher.trust)


def test_nor_whoever_has_the_publishers_credential_and_not_its_key(
    lab: GuardedFleet, image: Path, publisher: Identity
) -> None:
    sign_file(image, replace(publisher, signer=lab.identity("nano-1").signer), time.time())
    assert "signed with another key" in refused(image, publisher.trust)


def test_the_signature_of_a_credential_is_none_of_a_file(image: Path, publisher: Identity) -> None:
    """What was signed for one purpose serves no other."""
    document = json.loads(signature_of(image).read_bytes())
    document["signed"] = document["credential"]
    signature_of(image).write_text(json.dumps(document))
    assert refused(image, publisher.trust)


def test_what_was_signed_in_time_counts_for_good_and_nothing_that_was_signed_later(
    tmp_path: Path, lab: GuardedFleet, publisher: Identity
) -> None:
    ends = publisher.credential.expires
    for name, when, taken in (("before", ends - 1, True), ("after", ends + 1, False)):
        path = tmp_path / name
        path.write_bytes(b"x")
        sign_file(path, publisher, when)
        if taken:
            assert check_file(path, publisher.trust).issued == when
        else:
            assert "did not count" in refused(path, publisher.trust)


def test_a_revoked_publishers_signatures_count_no_more(fleet: GuardedFleet, tmp_path: Path) -> None:
    path = tmp_path / "image.img"
    path.write_bytes(b"x")
    sign_file(path, fleet.identity("publisher"), time.time())
    assert check_file(path, fleet.authority.trust)
    fleet.authority.revoke("publisher")
    assert "revoked" in refused(path, fleet.authority.trust)
    fleet.clock.ahead = DAY
    fleet.authority.make_member("publisher", fleet.home("publisher"))
    sign_file(path, fleet.identity("publisher"), fleet.clock() + 1)
    assert check_file(path, fleet.authority.trust)
