"""A payload in chunks: they come twice, in any order, altered, or never; and what has come outlasts its process."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.edge.protocol import chunks as module
from fleetune.edge.protocol.chunks import MAX_CHUNKS, Assembly, check, cut, describe, pack_bitmap, unpack_bitmap
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.messages import MAX_CHUNK, MAX_MESSAGE, MAX_PAYLOAD, Missing, Need, Payload, encode


def reason(call: Any, *arguments: Any) -> str:
    with pytest.raises(MessageError) as caught:
        call(*arguments)
    assert caught.value.remedy
    return caught.value.reason


def part(data: bytes, payload: Payload, index: int) -> bytes:
    ((number, chunk),) = cut(data, payload, [index])
    assert number == index
    return chunk


def feed(assembly: Assembly, data: bytes, indices: Iterable[int]) -> None:
    for index, chunk in cut(data, assembly.payload, indices):
        assembly.add(index, chunk)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that many examples share."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[bytes, Payload, list[int]]:
    """A payload, and the order in which its chunks come: every one at least once."""
    data = draw(st.binary(min_size=1, max_size=300))
    payload = describe(data, "f16", draw(st.integers(1, 320)))
    extra = draw(st.lists(st.integers(0, payload.chunks - 1), max_size=20))
    return data, payload, draw(st.permutations([*range(payload.chunks), *extra]))


@given(deliveries())
def test_chunks_may_come_twice_and_in_any_order(folder: Path, delivery: tuple[bytes, Payload, list[int]]) -> None:
    data, payload, order = delivery
    assembly = Assembly(payload, folder)
    for index in order:
        assembly.add(index, part(data, payload, index))
    assert assembly.complete
    assert assembly.missing == []
    assert assembly.finish() == data
    assert list(folder.iterdir()) == []


@given(deliveries(), st.data())
def test_missing_chunks_are_known_and_can_be_asked_for(
    folder: Path, delivery: tuple[bytes, Payload, list[int]], draw: Any
) -> None:
    data, payload, order = delivery
    lost = draw.draw(st.sets(st.sampled_from(order)))
    assembly = Assembly(payload, folder)
    for index in order:
        if index not in lost:
            assembly.add(index, part(data, payload, index))
    assert assembly.missing == sorted(lost)
    bitmap = assembly.missing_bitmap()
    assert len(bitmap) <= payload.chunks // 8 + 1
    for index in unpack_bitmap(bitmap, payload.chunks):
        assembly.add(index, part(data, payload, index))
    assert assembly.finish() == data


@given(deliveries(), st.data())
def test_a_chunk_of_a_wrong_length_or_number_is_refused_and_changes_nothing(
    folder: Path, delivery: tuple[bytes, Payload, list[int]], draw: Any
) -> None:
    data, payload, order = delivery
    assembly = Assembly(payload, folder)
    index = draw.draw(st.sampled_from(order))
    good = part(data, payload, index)
    for number, raw in (
        (index, good[:-1]),
        (index, good + b"x"),
        (-1, good),
        (payload.chunks, good),
        (1 << 80, good),
    ):
        assert reason(assembly.add, number, raw) == "wrong-chunk"
    assert assembly.missing == sorted(set(order))
    for number in order:
        assembly.add(number, part(data, payload, number))
    assert assembly.finish() == data


@given(deliveries(), st.data())
def test_altered_bytes_are_noticed_and_the_assembly_starts_over(
    folder: Path, delivery: tuple[bytes, Payload, list[int]], draw: Any
) -> None:
    data, payload, order = delivery
    assembly = Assembly(payload, folder)
    altered = bytearray(data)
    altered[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    for index in order:
        assembly.add(index, part(bytes(altered), payload, index))
    assert reason(assembly.finish) == "wrong-hash"
    assert assembly.missing == sorted(set(order))
    for index in order:
        assembly.add(index, part(data, payload, index))
    assert assembly.finish() == data


@pytest.mark.parametrize(("size", "chunk_size"), [
    (0, 10), (-1, 10), (MAX_PAYLOAD + 1, MAX_CHUNK), (1 << 60, MAX_CHUNK),
    (10, 0), (10, -1), (10, MAX_CHUNK + 1),
])  # fmt: skip
def test_sizes_beyond_the_limits_are_refused_before_room_is_taken(size: int, chunk_size: int, tmp_path: Path) -> None:
    payload = Payload("f16", "0" * 64, size, chunk_size)
    assert reason(check, payload) in ("payload-too-large", "chunk-too-large")
    assert reason(Assembly, payload, tmp_path / "parts") == reason(check, payload)
    assert not (tmp_path / "parts").exists()


def test_more_chunks_than_a_request_for_missing_ones_can_name_are_refused(tmp_path: Path) -> None:
    most = Payload("f16", "0" * 64, size=MAX_CHUNKS, chunk_size=1)
    for request in (Missing, lambda name, bitmap: Need(name, "0" * 64, bitmap)):
        assert len(encode(request("u" * 64, Assembly(most, tmp_path).missing_bitmap()))) <= MAX_MESSAGE
    assert reason(Assembly, Payload("f16", "0" * 64, size=MAX_CHUNKS + 1, chunk_size=1), tmp_path) == "too-many-chunks"


def test_the_largest_payload_is_accepted_in_the_usual_chunks(tmp_path: Path) -> None:
    payload = Payload("f16", "0" * 64, MAX_PAYLOAD, MAX_CHUNK)
    assert len(Assembly(payload, tmp_path).missing) == payload.chunks == 1024


def test_chunks_of_a_single_byte_take_little_memory(tmp_path: Path) -> None:
    payload = Payload("f16", "0" * 64, size=MAX_CHUNKS, chunk_size=1)
    tracemalloc.start()
    taken = Assembly(payload, tmp_path)
    for index in range(MAX_CHUNKS - 1):
        taken.add(index, b"x")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.usefixtures("slow_link")
def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside, data = tmp_path / "outside", bytes(range(200))
    outside.write_bytes(b"precious")
    payload = describe(data, "f16", 50)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / f"{payload.sha256}-50").symlink_to(outside)
    taken = Assembly(payload, tmp_path / "parts")
    with pytest.raises(OSError, match="symbolic links"):
        taken.add(0, data[:50])
    assert outside.read_bytes() == b"precious"


def test_a_payload_may_be_limited_to_what_it_is_for() -> None:
    payload = describe(bytes(1000), "f16")
    check(payload, 1000)
    assert reason(check, payload, 999) == "payload-too-large"


def test_a_description_fits_its_data() -> None:
    payload = describe(b"x" * (MAX_CHUNK + 1), "f16")
    assert (payload.size, payload.chunk_size, payload.chunks) == (MAX_CHUNK + 1, MAX_CHUNK, 2)
    assert payload.sha256 == hashlib.sha256(b"x" * (MAX_CHUNK + 1)).hexdigest()


@given(st.integers(1, 200), st.data())
def test_bitmaps_round_trip(count: int, data: Any) -> None:
    indices = data.draw(st.sets(st.integers(0, count - 1)))
    assert list(unpack_bitmap(pack_bitmap(sorted(indices), count), count)) == sorted(indices)


@given(st.binary(max_size=30), st.integers(0, 100))
def test_a_bitmap_from_the_network_names_no_chunk_beyond_the_count(bitmap: bytes, count: int) -> None:
    assert all(0 <= index < count for index in unpack_bitmap(bitmap, count))


# --- what outlasts a process ---------------------------------------------------------------------------------------

DATA = bytes(range(256)) * 4
PAYLOAD = describe(DATA, "f16", chunk_size=100)  # 11 chunks, the last of 24 bytes


slowly = pytest.mark.usefixtures("slow_link")


@slowly
def test_an_assembly_goes_on_where_a_killed_one_was(tmp_path: Path) -> None:
    feed(Assembly(PAYLOAD, tmp_path), DATA, [10, 3, 0])
    again = Assembly(PAYLOAD, tmp_path)
    assert again.missing == [1, 2, 4, 5, 6, 7, 8, 9]
    assert list(unpack_bitmap(again.missing_bitmap(), PAYLOAD.chunks)) == again.missing
    assert again.add(3, DATA[300:400]) is False
    feed(again, DATA, again.missing[:-1])
    last = Assembly(PAYLOAD, tmp_path)
    assert last.missing == [9]
    assert last.add(9, DATA[900:1000]) is True
    assert last.finish() == DATA
    assert list(tmp_path.iterdir()) == []


@slowly
def test_an_assembly_that_was_complete_before_its_process_was_killed_is_complete(tmp_path: Path) -> None:
    feed(Assembly(PAYLOAD, tmp_path), DATA, range(11))
    again = Assembly(PAYLOAD, tmp_path)
    assert again.complete
    assert again.finish() == DATA


@slowly
def test_a_payload_in_other_chunks_starts_over_beside_the_first(tmp_path: Path) -> None:
    feed(Assembly(PAYLOAD, tmp_path), DATA, range(5))
    other = Assembly(describe(DATA, "f16", chunk_size=50), tmp_path)
    assert len(other.missing) == 21
    feed(other, DATA, range(21))
    assert other.finish() == DATA
    assert Assembly(PAYLOAD, tmp_path).missing == list(range(5, 11))


@slowly
def test_equal_bytes_of_two_devices_do_not_meet(tmp_path: Path) -> None:
    one, two = Assembly(PAYLOAD, tmp_path / "one"), Assembly(PAYLOAD, tmp_path / "two")
    feed(one, DATA, range(6))
    feed(two, DATA, range(6, 11))
    assert Assembly(PAYLOAD, tmp_path / "two").missing == two.missing == list(range(6))
    feed(one, DATA, range(6, 11))
    assert one.finish() == DATA
    assert two.missing == list(range(6))
    feed(two, DATA, range(6))
    assert two.finish() == DATA


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def garble(raw: bytes) -> bytes:
    return raw[:150] + bytes([raw[150] ^ 1]) + raw[151:]


def zeros(raw: bytes) -> bytes:
    """What a file system may leave of a page after a power cut."""
    return bytes(500) + raw[500:]


@slowly
@pytest.mark.parametrize("damage", [garble, zeros])
def test_bytes_that_a_power_cut_garbled_are_noticed_and_all_is_asked_for_again(damage: Any, tmp_path: Path) -> None:
    feed(Assembly(PAYLOAD, tmp_path), DATA, range(8))
    file = the_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    again = Assembly(PAYLOAD, tmp_path)
    assert again.missing == [8, 9, 10]
    feed(again, DATA, again.missing)
    assert reason(again.finish) == "wrong-hash"
    assert again.missing == list(range(11))
    feed(again, DATA, range(11))
    assert again.finish() == DATA
    assert list(tmp_path.iterdir()) == []


@slowly
@pytest.mark.parametrize("length", [0, 90, 1024, 1030])
def test_a_file_that_a_power_cut_shortened_is_filled_again(length: int, tmp_path: Path) -> None:
    feed(Assembly(PAYLOAD, tmp_path), DATA, range(11))
    file = the_file(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    again = Assembly(PAYLOAD, tmp_path)
    assert again.missing == list(range(max(0, length - len(DATA)), 11))  # a byte for each chunk lies behind the bytes
    feed(again, DATA, again.missing)
    assert again.finish() == DATA


@slowly
def test_what_else_was_begun_in_the_folder_can_be_dropped(tmp_path: Path) -> None:
    feed(Assembly(describe(DATA[::-1], "f16", 100), tmp_path), DATA[::-1], range(5))
    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(5))
    assembly.drop_others()
    assert len(list(tmp_path.iterdir())) == 1
    feed(assembly, DATA, range(5, 11))
    assert assembly.finish() == DATA


def test_a_single_chunk_leaves_no_files(tmp_path: Path) -> None:
    payload = describe(b"small", "f16")
    assembly = Assembly(payload, tmp_path / "parts")
    assert assembly.add(0, b"small") is True
    assert assembly.finish() == b"small"
    assert not (tmp_path / "parts").exists()


@slowly
def test_what_was_dropped_leaves_no_files(tmp_path: Path) -> None:
    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(5))
    assembly.drop()
    assert list(tmp_path.iterdir()) == []
    assert Assembly(PAYLOAD, tmp_path).missing == list(range(11))


def test_what_comes_in_a_moment_never_touches_the_disk(tmp_path: Path) -> None:
    assembly = Assembly(PAYLOAD, tmp_path / "parts")
    feed(assembly, DATA, range(11))
    assert not assembly.slow
    assert assembly.finish() == DATA
    assert assembly.missing == list(range(11))
    assert not (tmp_path / "parts").exists()


def test_what_takes_longer_goes_to_disk_with_all_that_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(4))
    assert Assembly(PAYLOAD, tmp_path).missing == list(range(11))
    monkeypatch.setattr(module, "_QUICK", -1.0)
    assert not assembly.slow
    feed(assembly, DATA, [4])
    assert assembly.slow
    assert Assembly(PAYLOAD, tmp_path).missing == list(range(5, 11))
    feed(assembly, DATA, range(5, 11))
    assert assembly.finish() == DATA
    assert not assembly.slow


def test_memory_that_is_let_go_is_asked_for_again(tmp_path: Path) -> None:
    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(4))
    assembly.let_go()
    assert assembly.missing == list(range(11))
    feed(assembly, DATA, range(11))
    assert assembly.finish() == DATA


@slowly
def test_what_is_on_disk_is_not_let_go(tmp_path: Path) -> None:
    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(4))
    assembly.let_go()
    assert assembly.missing == list(range(4, 11))


@slowly
def test_a_chunk_that_the_disk_has_no_room_for_did_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assembly = Assembly(PAYLOAD, tmp_path)
    feed(assembly, DATA, range(4))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        assembly.add(4, DATA[400:500])
    assert assembly.missing == list(range(4, 11))
    monkeypatch.undo()
    feed(assembly, DATA, range(4, 11))
    assert assembly.finish() == DATA


def test_memory_does_not_grow_with_what_is_on_its_way(tmp_path: Path) -> None:
    import tracemalloc

    data = bytes(MAX_CHUNK) * 128
    assembly = Assembly(describe(data, "f16"), tmp_path)
    tracemalloc.start()
    for index in range(127):
        assembly.add(index, bytes(MAX_CHUNK))
    used, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 10 * MAX_CHUNK
    assert most < (2 << 20) + 10 * MAX_CHUNK
