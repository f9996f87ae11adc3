"""What comes up from devices: refused for a reason, or on disk before it is acknowledged; over a real broker."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.errors import MessageError
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import (
    MAX_PAYLOAD,
    MAX_SAMPLES,
    Ack,
    Announcement,
    Missing,
    Payload,
    Presence,
    UpdateManifest,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import embedded_broker, free_port
from fleetune.server.intake import Intake
from fleetune.server.job import Job, JobPrivacy
from fleetune.server.journal import Accepted, Announced, Journal, Record, Typical, read_records
from fleetune.server.quarantine import Quarantine
from fleetune.server.registry import Registry
from fleetune.server.round import OpenRound
from fleetune.server.rules.base import Bounds, norm_of
from fleetune.server.store import Store
from fleetune.server.strategies.base import NextRound
from support.smalldisk import fill, small_disk

TOPICS = Topics("lab")
EXPERT, GATE = ("blocks.", "head."), ("gate.",)
JOB = Job(
    id="fedms", method="fedms", backbone="b", quantisation="nf4",
    shapes={"head.bias": (2,), "head.weight": (64, 64), "gate.A": (3, 8)}, rounds={"global": 6}, settings={"depth": 2},
)  # fmt: skip
SMALL = {"head.bias": np.array([0.5, -0.5], np.float32)}
LARGE = {"head.weight": np.arange(4096, dtype=np.float32).reshape(64, 64)}


class Bench:
    """An aggregator's intake, and a peer that hears its answers."""

    def __init__(self, folder: Path, broker: BrokerAddress) -> None:
        self.journal = Journal(folder)
        self.store = Store(":memory:")
        self.registry = Registry(frozenset({"a", "b"}))
        self.registry.update(Presence(name="a", state="online", boot=1, kit="1"))
        self.link = Link(broker, "aggregator", subscriptions=[TOPICS.up("+", "need")])
        self.peer = Link(broker, "peer", subscriptions=[TOPICS.down("+", "+")])
        for link in (self.peer, self.link):
            link.connect()
            list(link.events(0.5))
        self.heard: list[tuple[str, Ack | Missing]] = []
        self.typical: Typical | None = None
        self.closed: list[int] = []
        self.current = self.announce(0)
        self.intake = self.new_intake()

    def new_intake(self, max_staleness: int = 2, job: Job = JOB) -> Intake:
        return Intake(
            *(self.link, TOPICS, "r", job, self.journal, self.store, self.registry),
            *(Quarantine(self.journal, self.store, self.registry, after=3), self.closed),
            max_staleness=max_staleness,
        )

    def announce(self, version: int, stage: Any = "global", trained: tuple[str, ...] = EXPERT) -> OpenRound:
        announcement = Announcement(
            fleet="lab", run="r", job="fedms", version=version, method="fedms", stage=stage, round=1, rounds=6,
            backbone="b", quantisation="nf4", settings={}, issued=0.0, expires=0.0,
        )  # fmt: skip
        self.current = OpenRound(
            announcement,
            NextRound(stage, 2, trained=trained),
            Bounds(JOB.rule, self.typical),
            lambda accepted: self.journal.load_update(accepted, JOB.shapes),
        )
        return self.current

    def close_round(self, **following: Any) -> None:
        version = self.current.announcement.version
        self.closed.append(version)
        self.announce(version + 1, **following)

    def listen(self, seconds: float = 5.0, count: int = 1) -> list[tuple[str, Ack | Missing]]:
        """Device and message of the next answers."""
        end = time.monotonic() + seconds
        while len(self.heard) < count and time.monotonic() < end:
            list(self.link.events(0.005))
            for event in self.peer.events(0.02):
                if isinstance(event, Received):
                    _, device, verb = TOPICS.split(event.topic)
                    self.heard.append((device, open_envelope(event.payload, Ack if verb == "ack" else Missing)))
        found, self.heard = self.heard[:count], self.heard[count:]
        return found

    def begin(self, manifest: UpdateManifest, *, device: str = "", update: str = "") -> None:
        self.intake.manifest(device or manifest.device, update or manifest.update, seal(manifest), self.current)

    def feed(self, manifest: UpdateManifest, data: bytes, indices: Any = None) -> None:
        assert manifest.payload is not None
        for index, part in chunks.cut(data, manifest.payload, indices or range(manifest.payload.chunks)):
            self.intake.chunk(manifest.device, manifest.update, index, part, self.current)

    def send(self, manifest: UpdateManifest, data: bytes = b"") -> None:
        self.begin(manifest)
        if manifest.payload is not None:
            self.feed(manifest, data)

    def refused(self, call: Callable[..., None], *arguments: Any, **options: Any) -> str:
        """Why something was refused; the device heard the same."""
        with pytest.raises(MessageError) as caught:
            call(*arguments, **options)
        ((_, ack),) = self.listen()
        assert isinstance(ack, Ack)
        assert (ack.accepted, ack.reason) == (False, caught.value.reason)
        return ack.reason

    def records(self) -> list[Record]:
        return list(read_records(self.journal.path))

    def accepted(self) -> list[tuple[str, int, int, int]]:
        """Device, version, round that it counts in, staleness."""
        found = [record for record in self.records() if isinstance(record, Accepted)]
        return [(r.manifest.device, r.manifest.version, r.into, r.staleness) for r in found]

    def close(self) -> None:
        self.link.close()
        self.peer.close()
        self.store.close()
        self.journal.close()


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerAddress]:
    with embedded_broker(free_port()) as address:
        yield address


@pytest.fixture
def bench(broker: BrokerAddress, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "run", broker)
    yield bench
    bench.close()


def update(
    tensors: dict[str, Any] | None = None, *, version: int = 0, chunk_size: int = 65536, **changes: Any
) -> tuple[UpdateManifest, bytes]:
    data = Codec.named("f16").encode(tensors) if tensors else b""
    manifest = UpdateManifest(
        fleet="lab", device="a", update=f"r-fedms-{version}", run="r", job="fedms", version=version, issued=0.0,
        backbone="b",
        samples=3, metrics={"loss": 0.5}, payload=chunks.describe(data, "f16", chunk_size) if data else None,
    )  # fmt: skip
    return msgspec.structs.replace(manifest, **changes), data


# --- what is taken ----------------------------------------------------------------------------------------------


def test_an_update_is_journaled_counted_and_acknowledged(bench: Bench) -> None:
    manifest, data = update(SMALL)
    bench.send(manifest, data)
    assert bench.accepted() == []
    assert bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    assert bench.accepted() == [("a", 0, 0, 0)]
    assert bench.store.has_update("a", "r-fedms-0")
    assert bench.current.answers == {"a": {"loss": 0.5}}
    np.testing.assert_array_equal(bench.current.gain()["head.bias"], SMALL["head.bias"])
    assert not bench.intake.commit(bench.current)


def test_a_private_job_takes_updates_with_its_noise_alone_and_all_count_the_same(bench: Bench) -> None:
    job = dataclasses.replace(JOB, privacy=JobPrivacy(0.6, clip=0.5, gate_clip=0.02, delta=1e-5))
    bench.intake = bench.new_intake(job=job)
    for changes in ({}, {"noise": 0.59, "samples": 1}, {"noise": 0.6}, {"noise": 0.6, "samples": 40}):
        manifest, data = update(SMALL, **changes)
        assert bench.refused(bench.send, manifest, data) == "not-private"
    bench.send(*update(SMALL, noise=0.6, samples=1))
    bench.intake.commit(bench.current)
    assert bench.accepted() == [("a", 0, 0, 0)]


def test_an_update_in_many_chunks_is_asked_for(bench: Bench) -> None:
    manifest, data = update(LARGE, chunk_size=1000)
    bench.begin(manifest)
    bench.intake.ask()
    ((device, missing),) = bench.listen()
    assert isinstance(missing, Missing)
    assert manifest.payload is not None
    assert (device, list(chunks.unpack_bitmap(missing.bitmap, 99))) == ("a", list(range(manifest.payload.chunks)))
    bench.feed(manifest, data, range(4))
    bench.begin(manifest)  # announced again
    bench.intake.ask()
    ((_, missing),) = bench.listen()
    assert isinstance(missing, Missing)
    rest = list(chunks.unpack_bitmap(missing.bitmap, 99))
    assert rest == list(range(4, manifest.payload.chunks))
    bench.feed(manifest, data, rest)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    assert list(bench.journal.parts("fedms").rglob("*-*")) == []


def test_an_update_that_comes_again_is_acknowledged_again_and_counts_once(bench: Bench) -> None:
    manifest, data = update(SMALL)
    bench.send(manifest, data)
    bench.begin(manifest)  # before it is on disk
    bench.feed(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    bench.send(manifest, data)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    assert not bench.intake.commit(bench.current)
    assert bench.accepted() == [("a", 0, 0, 0)]
    assert bench.current.updates == 1


def test_an_update_that_is_announced_again_after_its_round_was_closed_is_acknowledged(bench: Bench) -> None:
    manifest, data = update(SMALL)
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    for _ in range(5):
        bench.close_round()
    bench.begin(manifest)
    assert bench.listen(count=2) == [("a", Ack("r-fedms-0", accepted=True))] * 2
    assert bench.current.updates == 0


def test_updates_that_came_in_one_go_are_synced_in_one_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("a", "b"):
        manifest, data = update(SMALL, device=device)
        bench.send(manifest, data)
    real, synced = os.fsync, list[str]()

    def watched(descriptor: int) -> None:
        real(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", watched)
    bench.intake.commit(bench.current)
    assert synced.count("journal.jsonl") == synced.count("0.bin") == 1
    assert sorted(device for device, _ in bench.listen(count=2)) == ["a", "b"]


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "reason"), [
    ({"run": "another"}, "wrong-run"),
    ({"version": 7}, "stale-round"),
    ({"job": "standalone"}, "stale-round"),
    ({"backbone": "ab" * 32}, "wrong-backbone"),
    ({"samples": 0}, "no-samples"),
    ({"samples": -5}, "malformed"),
    ({"samples": MAX_SAMPLES + 1}, "malformed"),
    ({"version": -1}, "malformed"),
    ({"metrics": {"loss": 10**30}}, "malformed"),
    ({"metrics": {"loss": 1e305}}, "malformed"),
    ({"metrics": {f"m{n}": 0 for n in range(200)}}, "malformed"),
    ({"metrics": {"loss\n": 0.5}}, "malformed"),
    ({"fleet": "elsewhere"}, "wrong-topic"),
    ({"payload": Payload("f16", "ab" * 32, MAX_PAYLOAD + 1, 65536)}, "payload-too-large"),
    ({"payload": Payload("f16", "ab" * 32, 1 << 40, 65536)}, "payload-too-large"),
    ({"payload": Payload("f16", "ab" * 32, 0, 65536)}, "payload-too-large"),
    ({"payload": Payload("f16", "ab" * 32, 20_000, 65536)}, "payload-too-large"),  # 2 · (64 · 64 + 2), and names
    ({"payload": Payload("int4+zlib", "ab" * 32, 5_000, 65536)}, "payload-too-large"),
    ({"payload": Payload("f99", "ab" * 32, 9, 65536)}, "unknown-codec"),
    ({"payload": Payload("f16", "ab" * 32, 9, 1 << 20)}, "chunk-too-large"),
])  # fmt: skip
def test_a_manifest_is_refused_for_a_reason(changes: dict[str, Any], reason: str, bench: Bench) -> None:
    manifest, _ = update(**changes)
    assert bench.refused(bench.begin, manifest) == reason
    (row,) = bench.store.devices()
    assert (row.id, row.refused, row.reason) == ("a", 1, reason)
    assert not bench.intake.commit(bench.current)
    bench.intake.ask()
    assert bench.listen(0.1) == []
    good, data = update(SMALL)
    bench.send(good, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_a_manifest_on_anothers_topic_is_refused(bench: Bench) -> None:
    manifest, _ = update(SMALL)
    assert bench.refused(bench.begin, manifest, device="b") == "wrong-topic"
    assert bench.refused(bench.begin, manifest, update="r-fedms-9") == "wrong-topic"


def test_an_update_whose_device_is_revoked_before_it_is_whole_does_not_count(bench: Bench) -> None:
    manifest, data = update(LARGE, chunk_size=1000)
    bench.begin(manifest)
    bench.feed(manifest, data, range(manifest.payload.chunks - 1))  # type: ignore[union-attr]
    bench.registry.shut_out(frozenset({"a"}))
    bench.feed(manifest, data)
    assert not bench.intake.commit(bench.current)
    assert bench.accepted() == []


def test_a_stranger_is_refused_and_not_entered_into_the_books(bench: Bench) -> None:
    manifest, _ = update(device="stranger")
    assert bench.refused(bench.begin, manifest) == "unknown-device"
    assert bench.store.devices() == []


@pytest.mark.parametrize(("raw", "reason"), [
    (b"", "damaged"), (b"{", "damaged"), (b"\xff" * 99, "damaged"), (b"x" * 66_000, "message-too-large"),
])  # fmt: skip
def test_what_is_no_manifest_is_refused(raw: bytes, reason: str, bench: Bench) -> None:
    assert bench.refused(bench.intake.manifest, "a", "u", raw, bench.current) == reason


@pytest.mark.parametrize(("tensors", "reason"), [
    ({"head.bias": np.zeros(3)}, "wrong-shape"),
    ({"gate.A": np.zeros((3, 8))}, "unexpected-tensor"),  # of another stage
    ({"backbone.tokens": np.zeros(2)}, "unexpected-tensor"),
    ({**SMALL, "gate.A": np.zeros((3, 8))}, "unexpected-tensor"),
    ({"head.bias": np.array([0.0, np.nan])}, "not-finite"),
    ({"head.bias": np.array([0.0, np.inf])}, "not-finite"),
])  # fmt: skip
def test_tensors_that_the_round_does_not_ask_for_are_refused(
    tensors: dict[str, Any], reason: str, bench: Bench
) -> None:
    manifest, data = update(tensors)
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == reason
    assert not bench.intake.commit(bench.current)


def test_bytes_that_are_not_of_their_codec_are_refused(bench: Bench) -> None:
    manifest, data = update(SMALL)
    assert manifest.payload is not None
    payload = msgspec.structs.replace(manifest.payload, codec="f32")
    manifest = msgspec.structs.replace(manifest, payload=payload)
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == "wrong-dtype"


def test_a_round_in_which_nobody_trains_takes_no_tensors(bench: Bench) -> None:
    bench.announce(0, "prepare", ())
    manifest, _ = update(SMALL)
    assert bench.refused(bench.begin, manifest) == "unexpected-tensor"
    bench.send(update()[0])
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_a_chunk_that_does_not_fit_is_refused_and_what_is_here_stays(bench: Bench) -> None:
    manifest, data = update(LARGE, chunk_size=1000)
    bench.begin(manifest)
    bench.feed(manifest, data, range(5))
    for index, part in ((5, data[:999]), (99, data[:1000])):
        chunk = ("a", "r-fedms-0", index, part, bench.current)
        assert bench.refused(bench.intake.chunk, *chunk) == "wrong-chunk"
    assert manifest.payload is not None
    bench.feed(manifest, data, range(5, manifest.payload.chunks))
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_altered_bytes_are_refused_and_the_same_update_may_come_again(bench: Bench) -> None:
    manifest, data = update(LARGE, chunk_size=1000)
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, b"x" + data[1:]) == "wrong-hash"
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_a_chunk_that_nobody_announced_is_nothing(bench: Bench) -> None:
    bench.intake.chunk("a", "r-fedms-0", 0, b"x", bench.current)
    assert bench.listen(0.1) == []


# --- how much an update may be ----------------------------------------------------------------------------------


def much(times: float) -> dict[str, Any]:
    return {"head.bias": times * SMALL["head.bias"]}


def test_an_update_far_beyond_the_round_before_is_refused_and_its_device_told(bench: Bench) -> None:
    limit = JOB.rule.outlier
    bench.typical = Typical(norm_of(SMALL), samples=3)
    bench.announce(0)
    manifest, data = update(much(1.1 * limit))
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == "norm-outlier"
    assert not bench.intake.commit(bench.current)
    (row,) = bench.store.devices()
    assert (row.refused, row.reason) == (1, "norm-outlier")
    manifest, data = update(much(0.9 * limit))
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    np.testing.assert_allclose(bench.current.gain()["head.bias"], JOB.rule.clip * SMALL["head.bias"], rtol=1e-3)


def test_before_anything_is_typical_an_update_of_any_size_is_accepted(bench: Bench) -> None:
    manifest, data = update(much(1e4))
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_the_norm_of_an_update_is_on_record(bench: Bench) -> None:
    manifest, data = update({**LARGE, **SMALL})
    bench.send(manifest, data)
    bench.send(update(device="b")[0])
    bench.intake.commit(bench.current)
    first, second = (record for record in bench.records() if isinstance(record, Accepted))
    assert first.norm == pytest.approx(np.sqrt(np.square(LARGE["head.weight"]).sum() + 0.5))
    assert second.norm == 0
    assert bench.current.typical == Typical(first.norm, samples=3)


# --- what comes late --------------------------------------------------------------------------------------------


def test_an_update_of_a_closed_round_counts_in_the_one_that_is_open(bench: Bench) -> None:
    for _ in range(2):
        bench.close_round()
    for version, device in ((0, "a"), (1, "b")):
        manifest, data = update(SMALL, version=version, device=device)
        bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.accepted() == [("a", 0, 2, 2), ("b", 1, 2, 1)]
    assert (bench.current.answers, bench.current.late) == ({}, 2)
    assert [ack.accepted for _, ack in bench.listen(count=2) if isinstance(ack, Ack)] == [True, True]


def test_a_round_that_closes_while_chunks_are_on_their_way_makes_their_update_late(bench: Bench) -> None:
    manifest, data = update(LARGE, chunk_size=1000)
    bench.begin(manifest)
    bench.feed(manifest, data, range(3))
    bench.close_round()
    assert manifest.payload is not None
    bench.feed(manifest, data, range(3, manifest.payload.chunks))
    bench.intake.commit(bench.current)
    assert bench.accepted() == [("a", 0, 1, 1)]


def test_an_update_that_is_too_late_is_stale(bench: Bench) -> None:
    for _ in range(3):
        bench.close_round()
    manifest, data = update(SMALL, version=0)
    assert bench.refused(bench.begin, manifest) == "stale-round"
    manifest, data = update(SMALL, version=1)
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.accepted() == [("a", 1, 3, 2)]


def test_where_nothing_may_be_late_a_closed_round_is_stale(bench: Bench) -> None:
    bench.intake = bench.new_intake(max_staleness=0)
    bench.close_round()
    assert bench.refused(bench.begin, update(SMALL)[0]) == "stale-round"


def test_an_update_without_tensors_has_nothing_to_add_later(bench: Bench) -> None:
    bench.close_round()
    assert bench.refused(bench.begin, update()[0]) == "stale-round"


def test_a_late_update_of_the_stage_before_is_stale_not_wrong(bench: Bench) -> None:
    bench.close_round(stage="personal", trained=GATE)
    manifest, data = update(SMALL)
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == "stale-round"
    manifest, data = update({"head.bias": np.zeros(3)}, update="other")
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == "wrong-shape"


def test_a_late_update_may_be_as_large_as_any_round_of_its_job_asks_for(bench: Bench) -> None:
    bench.close_round(stage="personal", trained=GATE)
    manifest, data = update(LARGE)
    late = msgspec.structs.replace(manifest, version=1, update="r-fedms-1")
    assert bench.refused(bench.begin, late) == "payload-too-large"
    bench.begin(manifest)
    assert bench.refused(bench.feed, manifest, data) == "stale-round"


# --- the disk ---------------------------------------------------------------------------------------------------


def test_nothing_is_acknowledged_before_it_is_on_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, data = update(SMALL)
    bench.send(manifest, data)
    real, seen = os.fsync, list[tuple[str, int, list[Any]]]()

    def watched(descriptor: int) -> None:
        heard = bench.listen(0.1)
        real(descriptor)
        seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, bench.journal.size, heard))

    monkeypatch.setattr(os, "fsync", watched)
    bench.intake.commit(bench.current)
    monkeypatch.undo()
    assert [name for name, _, _ in seen][-3:] == ["0.bin", "updates", "journal.jsonl"]  # after their folders
    assert seen[-1][1] > 0
    assert all(heard == [] for _, _, heard in seen)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_an_update_that_does_not_reach_the_disk_is_not_acknowledged_and_does_not_count(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, data = update(SMALL)
    bench.send(manifest, data)

    def failing(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    bench.intake.commit(bench.current)
    monkeypatch.undo()
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=False, reason="no-room"))]
    assert bench.records() == []
    assert bench.current.updates == 0
    assert not bench.store.has_update("a", "r-fedms-0")
    bench.send(manifest, data)
    bench.intake.commit(bench.current)
    assert bench.listen() == [("a", Ack("r-fedms-0", accepted=True))]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=128) as disk:
        yield disk


@pytest.fixture
def cramped(broker: BrokerAddress, tiny_disk: Path) -> Iterator[Bench]:
    bench = Bench(tiny_disk / "run", broker)
    yield bench
    bench.close()


def test_a_full_disk_refuses_for_now_and_accepts_once_there_is_room(cramped: Bench, tiny_disk: Path) -> None:
    cramped.journal.append(Announced(cramped.current.announcement))
    manifest, data = update(SMALL)
    cramped.send(manifest, data)
    ballast = fill(tiny_disk, leave=0)
    assert cramped.intake.commit(cramped.current)
    assert cramped.listen() == [("a", Ack("r-fedms-0", accepted=False, reason="no-room"))]
    assert cramped.records() == [Announced(cramped.current.announcement)]
    assert cramped.current.updates == 0
    (row,) = cramped.store.devices()
    assert (row.refused, row.reason) == (1, "no-room")
    ballast.unlink()
    cramped.send(manifest, data)
    cramped.intake.commit(cramped.current)
    assert cramped.listen() == [("a", Ack("r-fedms-0", accepted=True))]
    assert cramped.accepted() == [("a", 0, 0, 0)]
    (record,) = (record for record in cramped.records() if isinstance(record, Accepted))
    np.testing.assert_array_equal(cramped.journal.load_update(record, JOB.shapes)["head.bias"], SMALL["head.bias"])


@pytest.mark.usefixtures("slow_link")
def test_chunks_for_which_there_is_no_room_are_refused_at_the_first(cramped: Bench, tiny_disk: Path) -> None:
    ballast = fill(tiny_disk, leave=4096)
    manifest, data = update(LARGE, chunk_size=1000)
    cramped.begin(manifest)
    assert cramped.refused(cramped.feed, manifest, data, [0]) == "no-room"
    cramped.intake.ask()
    assert cramped.listen(0.1) == []
    ballast.unlink()
    cramped.send(manifest, data)
    cramped.intake.commit(cramped.current)
    assert cramped.listen() == [("a", Ack("r-fedms-0", accepted=True))]


def test_updates_that_are_refused_for_want_of_room_take_none(cramped: Bench, tiny_disk: Path) -> None:
    """Room for the tensors, and none for the record: as often as they come again, they leave nothing behind."""
    manifest, data = update(SMALL)
    cramped.send(manifest, data)
    fill(tiny_disk, leave=4096)
    for _ in range(3):
        cramped.intake.commit(cramped.current)
        assert cramped.listen() == [("a", Ack("r-fedms-0", accepted=False, reason="no-room"))]
        assert sum(file.stat().st_size for file in cramped.journal.folder.rglob("*.bin")) == 0
        cramped.send(manifest, data)
