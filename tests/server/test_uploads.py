"""Updates on their way up: chunks that are lost, doubled, late, or of another attempt; and whose turn it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_PAYLOAD, Payload, UpdateManifest
from fleetune.server import uploads as module
from fleetune.server.uploads import Uploads

FIRST, SECOND = b"0123456789", b"abcdefghij"


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "parts")


def manifest(data: bytes, device: str = "nano-1", chunk_size: int = 4) -> UpdateManifest:
    return UpdateManifest(
        fleet="lab", device=device, update="u", run="r", job="fedms", version=1, issued=0.0,
        backbone="b", samples=1, metrics={},
        payload=chunks.describe(data, "f16", chunk_size),
    )  # fmt: skip


def send(uploads: Uploads, data: bytes, *indices: int, device: str = "nano-1") -> list[tuple[UpdateManifest, bytes]]:
    payload = manifest(data).payload
    assert payload is not None
    taken = [uploads.add(device, "u", index, part) for index, part in chunks.cut(data, payload, indices)]
    return [complete for complete in taken if complete is not None]


def asked(uploads: Uploads) -> dict[str, list[int]]:
    """Device → chunks that it is asked for now."""
    return {device: list(chunks.unpack_bitmap(missing.bitmap, 8)) for device, missing in uploads.grants()}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- chunks -----------------------------------------------------------------------------------------------------


def test_the_last_chunk_completes_an_update_whatever_the_order(uploads: Uploads, tmp_path: Path) -> None:
    uploads.begin(manifest(FIRST))
    assert send(uploads, FIRST, 2, 0, 0, 2) == []
    assert send(uploads, FIRST, 1) == [(manifest(FIRST), FIRST)]
    assert send(uploads, FIRST, 1, 2) == []  # copies that come late
    assert files(tmp_path) == []


def test_a_manifest_that_comes_again_keeps_what_is_here(uploads: Uploads) -> None:
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 0, 1)
    newer = msgspec.structs.replace(manifest(FIRST), metrics={"loss": 1.0})
    uploads.begin(newer)
    assert send(uploads, FIRST, 2) == [(newer, FIRST)]


@pytest.mark.usefixtures("slow_link")
def test_a_device_that_lost_its_disk_and_trained_again_starts_over(uploads: Uploads, tmp_path: Path) -> None:
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 0, 1)
    uploads.begin(manifest(SECOND))
    assert len(files(tmp_path)) == 0
    assert send(uploads, SECOND, 2) == []
    assert send(uploads, SECOND, 0, 1) == [(manifest(SECOND), SECOND)]
    assert files(tmp_path) == []


def test_two_devices_do_not_mix_even_if_their_bytes_are_equal(uploads: Uploads) -> None:
    for device, data in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        uploads.begin(manifest(data, device))
        send(uploads, data, 0, 1, device=device)
    for device, data in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        assert send(uploads, data, 2, device=device) == [(manifest(data, device), data)]


@pytest.mark.usefixtures("slow_link")
def test_what_came_outlasts_the_process(uploads: Uploads, tmp_path: Path) -> None:
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 1)
    again = Uploads(tmp_path / "parts")
    assert send(again, FIRST, 0, 2) == []  # nobody has announced it
    again.begin(manifest(FIRST))
    assert asked(again) == {"nano-1": [0, 2]}
    assert send(again, FIRST, 0, 2) == [(manifest(FIRST), FIRST)]


def test_an_update_of_another_hash_is_asked_for_again_as_a_whole(uploads: Uploads) -> None:
    uploads.begin(manifest(FIRST))
    with pytest.raises(MessageError) as caught:
        send(uploads, SECOND, 0, 1, 2)
    assert caught.value.reason == "wrong-hash"
    uploads.begin(manifest(FIRST))
    assert asked(uploads) == {"nano-1": [0, 1, 2]}
    assert send(uploads, FIRST, 0, 1, 2) == [(manifest(FIRST), FIRST)]


def test_sizes_beyond_the_limits_are_refused_and_leave_what_is_on_its_way(uploads: Uploads) -> None:
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 0, 1)
    large = msgspec.structs.replace(manifest(FIRST), payload=Payload("f16", "0" * 64, MAX_PAYLOAD + 1, 65536))
    with pytest.raises(MessageError) as caught:
        uploads.begin(large)
    assert caught.value.reason == "payload-too-large"
    assert send(uploads, FIRST, 2) == [(manifest(FIRST), FIRST)]


@pytest.mark.usefixtures("slow_link")
def test_what_was_dropped_is_forgotten(uploads: Uploads, tmp_path: Path) -> None:
    for device in ("a", "b"):
        uploads.begin(manifest(FIRST, device))
        send(uploads, FIRST, 0, device=device)
    uploads.drop("a", "another")
    assert len(files(tmp_path)) == 2
    uploads.drop("a", "u")
    assert len(files(tmp_path)) == 1
    assert asked(uploads) == {"b": [1, 2]}
    assert send(uploads, FIRST, 1, 2, device="a") == []
    uploads.clear()
    assert files(tmp_path) == []
    assert asked(uploads) == {}
    assert send(uploads, FIRST, 0, 1, 2, device="b") == []


# --- whose turn it is -------------------------------------------------------------------------------------------


def test_a_device_is_asked_once_for_what_is_missing_and_again_when_it_announces_again(uploads: Uploads) -> None:
    uploads.begin(manifest(FIRST))
    send(uploads, FIRST, 1)
    assert asked(uploads) == {"nano-1": [0, 2]}
    assert asked(uploads) == {}
    send(uploads, FIRST, 0)
    assert asked(uploads) == {}
    uploads.begin(manifest(FIRST))
    assert asked(uploads) == {"nano-1": [2]}


def test_a_single_chunk_comes_unasked(uploads: Uploads, tmp_path: Path) -> None:
    uploads.begin(manifest(FIRST, chunk_size=64))
    assert asked(uploads) == {}
    assert uploads.add("nano-1", "u", 0, FIRST) == (manifest(FIRST, chunk_size=64), FIRST)
    assert files(tmp_path) == []


@pytest.fixture
def crowd(uploads: Uploads) -> list[str]:
    """More devices than may send at the same time."""
    devices = [f"nano-{number}" for number in range(20)]
    for device in devices:
        uploads.begin(manifest(FIRST, device))
    return devices


def test_few_devices_send_at_the_same_time_in_the_order_in_which_they_came(uploads: Uploads, crowd: list[str]) -> None:
    first = list(asked(uploads))
    assert 1 <= len(first) < len(crowd) / 2
    assert first == crowd[: len(first)]
    assert asked(uploads) == {}
    done = list[str]()
    turn = first
    while turn:
        for device in turn:
            assert send(uploads, FIRST, 0, 1, 2, device=device) == [(manifest(FIRST, device), FIRST)]
            done.append(device)
        turn = list(asked(uploads))
    assert done == crowd


def test_one_that_is_refused_makes_room_for_the_next(uploads: Uploads, crowd: list[str]) -> None:
    first = list(asked(uploads))
    uploads.drop(first[2], "u")
    assert list(asked(uploads)) == [crowd[len(first)]]


@pytest.mark.usefixtures("slow_link")
def test_a_device_that_stalls_loses_its_turn_but_not_what_came(
    uploads: Uploads, crowd: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(asked(uploads))
    send(uploads, FIRST, 0, device=first[0])
    monkeypatch.setattr(module, "_STALLED", 0.0)
    assert list(asked(uploads)) == crowd[len(first) : 2 * len(first)]
    monkeypatch.undo()
    assert send(uploads, FIRST, 1, 2, device=first[0]) == [(manifest(FIRST, first[0]), FIRST)]


def test_the_memory_of_a_device_that_stalls_is_free_for_others(
    uploads: Uploads, crowd: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(asked(uploads))
    send(uploads, FIRST, 0, device=first[0])
    monkeypatch.setattr(module, "_STALLED", 0.0)
    asked(uploads)
    monkeypatch.undo()
    assert send(uploads, FIRST, 1, 2, device=first[0]) == []
    uploads.begin(manifest(FIRST, first[0]))  # as it does when it hears nothing
    for device in crowd[1:]:
        uploads.drop(device, "u")
    assert asked(uploads) == {first[0]: [0]}
    assert send(uploads, FIRST, 0, device=first[0]) == [(manifest(FIRST, first[0]), FIRST)]


def test_small_updates_do_not_wait_for_large_ones(uploads: Uploads, crowd: list[str]) -> None:
    asked(uploads)
    uploads.begin(manifest(SECOND, "late", chunk_size=64))
    asked(uploads)
    assert uploads.add("late", "u", 0, SECOND) == (manifest(SECOND, "late", chunk_size=64), SECOND)
    assert len(crowd) == 20
