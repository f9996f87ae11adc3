"""Global tensors on their way down: what an aggregator tells, chunk by chunk, to a device that loses some of it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fleetune.edge.agent import broadcasts as module
from fleetune.edge.agent.broadcasts import Broadcasts
from fleetune.edge.agent.state import State
from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Tensors, read_exact
from fleetune.edge.protocol.errors import MessageError, RunFailedError
from fleetune.edge.protocol.messages import Announcement, Need, Payload
from fleetune.server.globals import Globals

pytestmark = pytest.mark.usefixtures("slow_link")

JOB = "fedms"
SHAPES = {"blocks.2.query.A": (64, 4), "head.weight": (64, 2)}
CHUNK = 128


class Aggregator:
    """The aggregator's global tensors, and the announcements that follow from them."""

    def __init__(self, codec: str = "f16", job: str = JOB) -> None:
        self.globals = Globals(codec)
        self._job, self._version = job, -1
        self._rng = np.random.default_rng(0)
        self.bytes: dict[str, bytes] = {}

    def announce(self) -> Announcement:
        """The next round: tensors have moved, except before the first."""
        self._version += 1
        since, changes = None, None
        if self._version:
            shapes = dict(SHAPES)
            if self._version % 2 == 0:  # nobody trained the head, and what it was stays
                del shapes["head.weight"]
            self.globals.add({n: self._rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()})
            since, changes = self.globals.tell(("blocks.", "head."), CHUNK)
        self.bytes |= self.globals.payloads
        return Announcement(
            fleet="lab", run="r", job=self._job, version=self._version, method="fedms", stage="global",
            round=self._version, rounds=9, backbone="b", quantisation="nf4", settings={}, issued=0.0, expires=0.0,
            whole=self.globals.whole, since=since, changes=changes,
        )  # fmt: skip

    def told(self) -> bytes:
        """What devices should have now."""
        assert self.globals.whole is not None
        return self.globals.payloads[self.globals.whole.sha256]


class Device:
    """A device's part, without a network, and without patience while nobody sends."""

    def __init__(self, folder: Path) -> None:
        self.state = State(folder, "nano-1")
        self.broadcasts = Broadcasts(self.state, lambda _announced: SHAPES)

    def restart(self) -> Device:
        self.state.close()
        return Device(self.state.folder)

    def feed(
        self, aggregator: Aggregator, payload: Payload | None, indices: Iterable[int] | None = None, job: str = JOB
    ) -> list[bool]:
        assert payload is not None
        wanted = chunks.cut(aggregator.bytes[payload.sha256], payload, indices or range(payload.chunks))
        return [self.broadcasts.add(job, payload.sha256, index, part) for index, part in wanted]

    def need(self, within: float = 0.5) -> list[tuple[str, list[int]]]:
        """Hash and chunks that it asks for, in a moment."""
        end = time.monotonic() + within
        found = list[Need]()
        while not found and time.monotonic() < end:
            found = list(self.broadcasts.overdue())
            time.sleep(0.005)
        return [(need.sha256, list(chunks.unpack_bitmap(need.bitmap, 999))) for need in found]

    def has(self, announced: Announcement, aggregator: Aggregator) -> bool:
        """Whether the round is ready, with the tensors that the aggregator believes to be here."""
        if self.broadcasts.ready() != announced:
            return False
        assert announced.whole is not None
        here, wanted = self.broadcasts.tensors(announced), read_exact(aggregator.told())
        assert here.keys() == wanted.keys()
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(here[name], tensor)
        return True


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "state")


@pytest.fixture(params=["f16", "int4", "int8+zlib"])
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return Aggregator(request.param)


def all_of(payload: Payload | None) -> list[tuple[str, list[int]]]:
    assert payload is not None
    return [(payload.sha256, list(range(payload.chunks)))]


# --- what is sent to all ----------------------------------------------------------------------------------------


def test_a_round_that_starts_from_the_seed_needs_nothing(device: Device, aggregator: Aggregator) -> None:
    announced = aggregator.announce()
    device.broadcasts.want(announced, under_way=True)
    assert device.broadcasts.ready() == announced
    assert device.broadcasts.tensors(announced) == {}
    assert device.need() == []


def test_changes_lead_from_round_to_round_to_what_the_aggregator_believes_bit_for_bit(
    device: Device, aggregator: Aggregator
) -> None:
    device.broadcasts.want(aggregator.announce(), under_way=True)
    for number in range(4):
        announced = aggregator.announce()
        assert (announced.since is None) == (number == 0)
        device.broadcasts.want(announced, under_way=True)
        assert device.broadcasts.ready() is None
        taken = device.feed(aggregator, announced.changes)
        assert taken == [False] * (len(taken) - 1) + [True]
        assert device.has(announced, aggregator)
        if number % 2:
            device = device.restart()
            device.broadcasts.want(announced, under_way=False)
            assert device.has(announced, aggregator)


def test_the_order_in_which_chunks_come_does_not_matter(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    device.feed(aggregator, announced.changes, [0, 0, *reversed(range(announced.changes.chunks))])
    assert device.has(announced, aggregator)


def test_who_lacks_what_changes_are_added_to_asks_for_the_whole(device: Device, aggregator: Aggregator) -> None:
    for _ in range(2):
        aggregator.announce()
    announced = aggregator.announce()
    device.broadcasts.want(announced, under_way=True)
    assert device.broadcasts.asked() == set()
    assert device.need() == all_of(announced.whole)
    assert announced.whole is not None
    assert device.broadcasts.asked() == {(JOB, announced.whole.sha256)}
    assert not any(device.feed(aggregator, announced.changes))  # they are for others
    device.feed(aggregator, announced.whole)
    assert device.has(announced, aggregator)
    assert device.broadcasts.asked() == set()
    following = aggregator.announce()
    device.broadcasts.want(following, under_way=True)
    device.feed(aggregator, following.changes)
    assert device.has(following, aggregator)


def test_chunks_that_are_under_way_are_not_asked_for(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    device.broadcasts.want(aggregator.announce(), under_way=True)
    assert device.need() == []


def test_chunks_that_nobody_sends_are_asked_for_soon(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    announced = aggregator.announce()
    device.broadcasts.want(announced, under_way=False)
    assert device.need() == all_of(announced.changes)


def test_what_was_lost_with_the_connection_is_asked_for_soon(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    device.feed(aggregator, announced.changes, [0])
    device.broadcasts.hurry()
    assert device.need() == [(announced.changes.sha256, list(range(1, announced.changes.chunks)))]


def test_only_what_is_missing_is_asked_for_and_less_and_less_often(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    aggregator = Aggregator()
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    device.feed(aggregator, announced.changes, [1])
    rest = [i for i in range(announced.changes.chunks) if i != 1]
    asked = []
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        for need in device.broadcasts.overdue():
            assert list(chunks.unpack_bitmap(need.bitmap, announced.changes.chunks)) == rest
            asked.append(time.monotonic())
        time.sleep(0.002)
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert 3 <= len(asked) <= 4
    assert all(later > 1.5 * pause for pause, later in pairwise(pauses))
    device.feed(aggregator, announced.changes, rest)
    assert device.has(announced, aggregator)


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_changes_that_lead_elsewhere_are_not_kept_and_the_whole_is_asked_for(device: Device) -> None:
    aggregator, other = Aggregator(), Aggregator()
    for some in (aggregator, other):
        some.announce()
    announced = aggregator.announce()
    other.announce()
    another = other.announce()  # with another whole
    aggregator.bytes |= other.bytes
    mixed = msgspec.structs.replace(announced, whole=another.whole)
    device.broadcasts.want(mixed, under_way=True)
    device.feed(aggregator, announced.changes)
    assert device.broadcasts.ready() is None
    assert device.need() == all_of(another.whole)
    device.feed(aggregator, another.whole)
    assert device.has(mixed, other)


def test_altered_chunks_are_noticed_and_all_are_asked_for_again(device: Device) -> None:
    aggregator = Aggregator()
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    good = aggregator.bytes[announced.changes.sha256]
    aggregator.bytes[announced.changes.sha256] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(MessageError) as caught:
        device.feed(aggregator, announced.changes)
    assert caught.value.reason == "wrong-hash"
    assert device.broadcasts.ready() is None
    device.broadcasts.hurry()
    assert device.need() == all_of(announced.changes)
    aggregator.bytes[announced.changes.sha256] = good
    device.feed(aggregator, announced.changes)
    assert device.has(announced, aggregator)


# --- what no job can mean ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "changes", "reason"), [
    ("whole", {"size": 4096}, "payload-too-large"),  # 4 · (64 · 4 + 64 · 2), and names
    ("whole", {"size": 1 << 40}, "payload-too-large"),
    ("changes", {"size": 4096}, "payload-too-large"),
    ("changes", {"chunk_size": 0}, "chunk-too-large"),
    ("changes", {"codec": "f99"}, "unknown-codec"),
    ("whole", {"codec": "int4+zlib"}, "unknown-codec"),
])  # fmt: skip
def test_tensors_that_cannot_be_the_jobs_are_refused_before_they_are_asked_for(
    field: str, changes: dict[str, Any], reason: str, device: Device
) -> None:
    aggregator = Aggregator()
    before = aggregator.announce()
    device.broadcasts.want(before, under_way=True)
    announced = aggregator.announce()
    bad = msgspec.structs.replace(getattr(announced, field), **changes)
    with pytest.raises(MessageError) as caught:
        device.broadcasts.want(msgspec.structs.replace(announced, **{field: bad}), under_way=False)
    assert caught.value.reason == reason
    assert device.need(within=0.3) == []
    assert device.broadcasts.ready() == before
    assert not (device.state.folder / "parts").exists()


@pytest.mark.parametrize("tensors", [
    {"backbone.tokens": np.zeros(8, np.float32)},
    {"head.weight": np.zeros((2, 64), np.float32)},
    {"head.weight": np.full((64, 2), np.nan, np.float32)},
])  # fmt: skip
def test_announced_tensors_that_are_of_no_use_are_asked_for_once(tensors: Tensors, device: Device) -> None:
    aggregator = Aggregator()
    aggregator.announce()
    data = module.EXACT.encode(tensors)
    whole = chunks.describe(data, "f32", CHUNK)
    aggregator.bytes[whole.sha256] = data
    announced = msgspec.structs.replace(aggregator.announce(), whole=whole, changes=None, since=None)
    device.broadcasts.want(announced, under_way=False)
    assert device.need() == all_of(whole)
    device.feed(aggregator, whole)
    assert device.need(within=0.3) == []
    assert device.broadcasts.ready() == announced
    with pytest.raises(RunFailedError, match="of no use"):
        device.broadcasts.tensors(announced)
    good = aggregator.announce()
    device.broadcasts.want(good, under_way=False)
    device.feed(aggregator, good.whole)
    assert device.has(good, aggregator)


def garble(folder: Path, sha256: str) -> None:
    (file,) = (folder / "globals").glob(f"{sha256}*")
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def follow(device: Device, aggregator: Aggregator, rounds: int) -> Announcement:
    """Take part in some rounds."""
    for _ in range(rounds):
        announced = aggregator.announce()
        device.broadcasts.want(announced, under_way=True)
        if announced.changes is not None:
            device.feed(aggregator, announced.changes)
    return announced


def test_global_tensors_that_the_disk_garbled_are_asked_for_again(device: Device) -> None:
    aggregator = Aggregator()
    announced = follow(device, aggregator, 3)
    assert announced.whole is not None
    garble(device.state.folder, announced.whole.sha256)
    device = device.restart()
    device.broadcasts.want(announced, under_way=False)
    assert device.broadcasts.ready() == announced
    with pytest.raises(MessageError, match="is damaged"):
        device.broadcasts.tensors(announced)
    device.broadcasts.want(announced, under_way=False)
    ((sha256, _),) = device.need()
    device.feed(
        aggregator, announced.changes if announced.changes and sha256 == announced.changes.sha256 else announced.whole
    )
    assert device.has(announced, aggregator)


def test_when_the_disk_garbled_what_changes_are_added_to_the_whole_is_asked_for(device: Device) -> None:
    aggregator = Aggregator()
    before = follow(device, aggregator, 3)
    assert before.whole is not None
    garble(device.state.folder, before.whole.sha256)
    device = device.restart()
    announced = aggregator.announce()
    device.broadcasts.want(announced, under_way=True)
    try:
        device.feed(aggregator, announced.changes)
    except MessageError as error:
        assert error.reason == "wrong-hash"
    assert device.broadcasts.ready() is None
    assert device.need() == all_of(announced.whole)
    device.feed(aggregator, announced.whole)
    assert device.has(announced, aggregator)


def test_a_round_whose_tensors_are_all_here_needs_no_disk(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator = Aggregator()
    aggregator.announce()
    announced = aggregator.announce()
    device.broadcasts.want(announced, under_way=True)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        device.feed(aggregator, announced.changes)
    monkeypatch.undo()
    assert device.has(announced, aggregator)
    assert device.need(within=0.3) == []


# --- restarts, and other rounds ---------------------------------------------------------------------------------


def test_a_download_goes_on_after_a_restart(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    device.feed(aggregator, announced.changes, [0])
    device = device.restart()  # nothing was said or closed
    device.broadcasts.want(announced, under_way=False)
    rest = list(range(1, announced.changes.chunks))
    assert device.need() == [(announced.changes.sha256, rest)]
    device.feed(aggregator, announced.changes, rest)
    assert device.has(announced, aggregator)
    assert list(device.state.parts("fedms").iterdir()) == []


def test_what_came_in_a_moment_never_touches_the_disk_and_comes_again_after_a_restart(
    device: Device, aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_QUICK", 60.0)
    for _ in range(4):
        announced = aggregator.announce()
        device.broadcasts.want(announced, under_way=True)
        if announced.changes is not None:
            device.feed(aggregator, announced.changes)
        assert device.broadcasts.ready() == announced
    assert device.has(announced, aggregator)
    assert not (device.state.folder / "parts").exists()
    assert not (device.state.folder / "globals").exists()
    device = device.restart()
    device.broadcasts.want(announced, under_way=False)
    assert device.need() == all_of(announced.whole)
    device.feed(aggregator, announced.whole)
    assert device.has(announced, aggregator)


def test_a_round_that_is_announced_again_keeps_what_is_here(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    device.broadcasts.want(announced, under_way=True)
    device.feed(aggregator, announced.changes, [0])
    device.broadcasts.want(announced, under_way=False)
    assert device.need() == [(announced.changes.sha256, list(range(1, announced.changes.chunks)))]
    device.broadcasts.want(announced, under_way=True)
    assert device.broadcasts.asked() == {(JOB, announced.changes.sha256)}  # what was asked for is still to come


def test_what_came_of_a_round_that_is_over_is_let_go(device: Device, aggregator: Aggregator) -> None:
    aggregator.announce()
    device.broadcasts.want(first := aggregator.announce(), under_way=True)
    device.feed(aggregator, first.changes, [0])
    device = device.restart()
    device.broadcasts.want(second := aggregator.announce(), under_way=True)
    assert second.whole is not None
    assert {file.name.partition("-")[0] for file in device.state.parts("fedms").iterdir()} <= {second.whole.sha256}
    assert not any(device.feed(aggregator, first.changes))
    device.broadcasts.forget(JOB)
    assert list(device.state.parts("fedms").iterdir()) == []
    assert device.broadcasts.ready() is None
    assert device.need(within=0.3) == []


def test_two_jobs_do_not_disturb_each_other(device: Device) -> None:
    one, two = Aggregator(), Aggregator("int8", job="other")
    for some in (one, two):
        some.announce()
    first, second = one.announce(), two.announce()
    for announced in (first, second):
        device.broadcasts.want(announced, under_way=True)
    device.feed(one, first.changes, [0])
    device.feed(two, second.changes, job="other")
    assert device.has(second, two)
    device.broadcasts.forget("other")
    assert first.changes is not None
    device.feed(one, first.changes, range(1, first.changes.chunks))
    assert device.has(first, one)


@pytest.mark.parametrize("sizes", [{"size": 1 << 40}, {"chunk_size": 1 << 20}, {"size": 0}])
def test_sizes_beyond_the_limits_are_refused(sizes: dict[str, int], device: Device) -> None:
    aggregator = Aggregator()
    aggregator.announce()
    announced = aggregator.announce()
    assert announced.changes is not None
    bad = msgspec.structs.replace(announced, changes=msgspec.structs.replace(announced.changes, **sizes))
    with pytest.raises(MessageError, match="announced"):
        device.broadcasts.want(bad, under_way=True)


def kept(device: Device) -> Tensors:
    return {file.name: np.zeros(0, np.float32) for file in (device.state.folder / "globals").iterdir()}


def test_the_disk_does_not_fill_with_rounds(device: Device) -> None:
    follow(device, Aggregator(), 12)
    assert 2 <= len(kept(device)) <= 5


def test_a_board_whose_clock_is_behind_keeps_the_newest(device: Device) -> None:
    aggregator = Aggregator()
    follow(device, aggregator, 6)
    for file in (device.state.folder / "globals").iterdir():  # before it woke up in the past
        os.utime(file, (time.time() + 1e6, time.time() + 1e6))
    announced = follow(device, aggregator, 1)
    device = device.restart()
    device.broadcasts.want(announced, under_way=False)
    assert device.has(announced, aggregator)
