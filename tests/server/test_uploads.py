"""Updates on their way up: chunks that are lost, doubled, late, or of another attempt."""

from __future__ import annotations

import msgspec
import pytest

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import Missing, UpdateManifest
from fleetune.server.uploads import Uploads

FIRST, SECOND = b"0123456789", b"abcdefghij"


def manifest(data: bytes, device: str = "nano-1") -> UpdateManifest:
    return UpdateManifest(
        fleet="lab", device=device, update="u", run="r", job="fedms", version=1, backbone="b", samples=1, metrics={},
        payload=chunks.describe(data, "f16", chunk_size=4),
    )  # fmt: skip


def send(uploads: Uploads, data: bytes, *indices: int, device: str = "nano-1") -> list[tuple[UpdateManifest, bytes]]:
    payload = manifest(data).payload
    assert payload is not None
    taken = [uploads.add(device, "u", index, chunks.chunk(data, payload, index)) for index in indices]
    return [complete for complete in taken if complete is not None]


def test_the_last_chunk_completes_an_update_whatever_the_order() -> None:
    uploads = Uploads()
    uploads.begin(manifest(FIRST))
    assert send(uploads, FIRST, 2, 0, 0, 2) == []
    assert send(uploads, FIRST, 1) == [(manifest(FIRST), FIRST)]
    assert send(uploads, FIRST, 1, 2) == []  # copies that come late


def test_a_manifest_that_comes_again_keeps_what_is_here() -> None:
    uploads = Uploads()
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 0, 1)
    uploads.begin(msgspec.structs.replace(manifest(FIRST), metrics={"loss": 1.0}))
    assert [data for _, data in send(uploads, FIRST, 2)] == [FIRST]


def test_a_device_that_lost_its_disk_and_trained_again_starts_over() -> None:
    uploads = Uploads()
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 0, 1)
    uploads.begin(manifest(SECOND))
    assert send(uploads, SECOND, 2) == []
    assert send(uploads, SECOND, 0, 1) == [(manifest(SECOND), SECOND)]


def test_two_devices_do_not_mix() -> None:
    uploads = Uploads()
    for device, data in (("a", FIRST), ("b", SECOND)):
        uploads.begin(manifest(data, device))
        send(uploads, data, 0, 1, device=device)
    assert send(uploads, FIRST, 2, device="a") == [(manifest(FIRST, "a"), FIRST)]
    assert send(uploads, SECOND, 2, device="b") == [(manifest(SECOND, "b"), SECOND)]


def test_only_what_is_missing_is_asked_for_and_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads()
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 1)
    assert list(uploads.overdue()) == []
    monkeypatch.setattr(chunks, "_REPAIR_AFTER", 0.0)
    assert list(uploads.overdue()) == [("nano-1", Missing("u", bytes([0b101])))]


def test_an_update_of_another_hash_is_asked_for_again_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads()
    uploads.begin(manifest(FIRST))
    with pytest.raises(MessageError) as caught:
        send(uploads, SECOND, 0, 1, 2)
    assert caught.value.reason == "wrong-hash"
    monkeypatch.setattr(chunks, "_REPAIR_AFTER", 0.0)
    assert list(uploads.overdue()) == [("nano-1", Missing("u", bytes([0b111])))]
    assert [data for _, data in send(uploads, FIRST, 0, 1, 2)] == [FIRST]


def test_what_was_dropped_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_REPAIR_AFTER", 0.0)
    uploads = Uploads()
    for device in ("a", "b"):
        uploads.begin(manifest(FIRST, device))
    uploads.drop("a", "u")
    assert [device for device, _ in uploads.overdue()] == ["b"]
    uploads.clear()
    assert list(uploads.overdue()) == []
    assert send(uploads, FIRST, 0, 1, 2, device="b") == []
