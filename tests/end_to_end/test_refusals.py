"""What the aggregator refuses from the network, and that it goes on afterwards: a device made of nothing but a link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import (
    Ack,
    Announcement,
    Payload,
    Presence,
    UpdateManifest,
    open_envelope,
    seal,
)
from fleetune.edge.protocol.topics import Topics
from fleetune.server.journal import Accepted, Readmitted, Started

TOPICS = Topics("lab")
ROUNDS = ("--global-rounds", "1", "--personal-rounds", "1")


class HandMade:
    """A device that sends what it is told to."""

    def __init__(self, broker: str, name: str) -> None:
        self.name = name
        self.heard: list[Received] = []
        gone = Presence(name=name, state="offline", boot=1, kit="")
        self.link = Link(
            BrokerAddress.parse(broker),
            name,
            subscriptions=[TOPICS.current("+"), TOPICS.down(name, "ack")],
            will=lambda: (TOPICS.presence(name), gone),
        )
        self.link.connect()
        self.link.say(TOPICS.presence(name), Presence(name=name, state="online", boot=1, kit=""), retain=True)

    def hear(self, suffix: str) -> bytes:
        """The next message of a topic; the others wait."""
        for _ in range(60):
            for event in self.heard:
                if event.topic.endswith(suffix):
                    self.heard.remove(event)
                    return event.payload
            self.heard += [event for event in self.link.events(1.0) if isinstance(event, Received)]
        raise AssertionError(f"nothing came on {suffix}")

    def round(self, run: str) -> Announcement:
        """The next round of a run; the broker may keep one of another test's."""
        while True:
            raw = self.hear("/current")
            if raw and (announced := open_envelope(raw, Announcement)).run == run:
                return announced

    def answer(self, announced: Announcement, tensors: dict[str, Any] | None = None) -> UpdateManifest:
        """A good answer to a round."""
        return UpdateManifest(
            fleet="lab", device=self.name, update=f"u-{announced.version}", run=announced.run, job=announced.job,
            version=announced.version, issued=0.0, backbone=announced.backbone, samples=3, metrics={"depth": 1},
            payload=chunks.describe(Codec.named("f16").encode(tensors), "f16") if tensors else None,
        )  # fmt: skip

    def send(self, manifest: UpdateManifest, data: bytes = b"", *, update: str = "") -> Ack:
        """Send an update and return the answer."""
        update = update or manifest.update
        self.link.publish(TOPICS.upload_manifest(self.name, update), seal(manifest))
        if manifest.payload and data:  # a single chunk follows its manifest at once
            parts = chunks.cut(data, manifest.payload, range(manifest.payload.chunks))
            self.link.send((TOPICS.upload_chunk(self.name, update, i), part) for i, part in parts)
        return open_envelope(self.hear("/ack"), Ack)


@contextmanager
def hand_made(broker: str, name: str) -> Iterator[HandMade]:
    device = HandMade(broker, name)
    try:
        yield device
    finally:
        device.link.close()


def refusal(ack: Ack) -> str:
    assert not ack.accepted
    return ack.reason


def test_what_does_not_belong_to_the_round_is_refused_for_a_reason(make_fleet: Any, any_broker: str) -> None:
    fleet = make_fleet(any_broker)
    fleet.write({"small": ("1GiB", 100.0)})
    serve = fleet.serve(*ROUNDS, "--quarantine-after", "99")
    with hand_made(any_broker, "small") as device, hand_made(any_broker, "stranger") as stranger:
        fleet.wait_for(lambda records: any(isinstance(record, Started) for record in records))
        run = fleet.records()[0].run
        prepare = device.round(run)
        good = device.answer(prepare)
        for changes, reason in (
            ({"run": "another"}, "wrong-run"),
            ({"version": 7}, "stale-round"),
            ({"job": "standalone"}, "stale-round"),
            ({"backbone": "ab" * 32}, "wrong-backbone"),
            ({"samples": 0}, "no-samples"),
            ({"fleet": "elsewhere"}, "wrong-topic"),
            ({"payload": Payload("f16", "ab" * 32, 9, 65536)}, "unexpected-tensor"),  # nobody trains yet
        ):
            assert refusal(device.send(msgspec.structs.replace(good, **changes))) == reason, serve.output
        assert refusal(device.send(good, update="u-9")) == "wrong-topic"
        assert refusal(stranger.send(stranger.answer(prepare))) == "unknown-device"
        assert device.send(good).accepted
        assert device.send(good).accepted  # a second time: it is there already
        trains = device.round(run)
        for tensors, reason in (
            ({"head.bias": np.zeros(3)}, "wrong-shape"),
            ({"gate.A": np.zeros((32, 8))}, "unexpected-tensor"),
            ({"backbone.tokens": np.zeros(2)}, "unexpected-tensor"),
            ({"head.bias": np.array([0.0, np.nan])}, "not-finite"),
        ):
            bad = msgspec.structs.replace(device.answer(trains, tensors), update="bad")
            assert refusal(device.send(bad, Codec.named("f16").encode(tensors))) == reason
        for size in (1 << 20, 1 << 40):
            bad = msgspec.structs.replace(device.answer(trains), payload=Payload("f16", "ab" * 32, size, 65536))
            assert refusal(device.send(bad)) == "payload-too-large"
        tensors = {"head.bias": np.array([0.5, -0.5])}
        assert device.send(device.answer(trains, tensors), Codec.named("f16").encode(tensors)).accepted
        assert serve.process.poll() is None, serve.output
    accepted = [record.manifest for record in fleet.records() if isinstance(record, Accepted)]
    assert [(manifest.device, manifest.version) for manifest in accepted] == [("small", 0), ("small", 1)]
    assert "Traceback" not in serve.output


def test_a_device_that_sends_nothing_but_bad_updates_is_kept_out_until_it_is_let_in_again(
    make_fleet: Any, embedded: str
) -> None:
    fleet = make_fleet(embedded)
    options = (*ROUNDS, "--quorum", "1", "--quarantine-after", "2")
    serve = fleet.serve(*options)
    bad, good = {"head.bias": np.array([0.0, np.nan])}, {"head.bias": np.array([0.5, -0.5])}
    with hand_made(embedded, "small") as small, hand_made(embedded, "big") as big:
        fleet.wait_for(lambda records: any(isinstance(record, Started) for record in records))
        run = fleet.records()[0].run
        prepare = small.round(run)
        assert small.send(small.answer(prepare)).accepted
        assert big.send(big.answer(prepare)).accepted
        trains = small.round(run)
        for update, reason in (
            ("one", "not-finite"),
            ("one", "not-finite"),  # once more, and counts no more than once
            ("two", "not-finite"),
            ("three", "quarantined"),
        ):
            answer = msgspec.structs.replace(small.answer(trains, bad), update=update)
            assert refusal(small.send(answer, Codec.named("f16").encode(bad))) == reason
        assert big.send(big.answer(trains, good), Codec.named("f16").encode(good)).accepted
        assert small.round(run).version == trains.version + 1  # which waited for nobody
        shown = fleet.start("status", "--state", str(fleet.folder / "aggregator"))
        assert shown.wait() == 0
        (row,) = [line for line in shown.output.splitlines() if line.startswith("small ")]
        assert "quarantined: not-finite" in row
        serve.kill()
        again = fleet.serve(*options, "--readmit", "small")
        fleet.wait_for(lambda records: isinstance(records[-1], Readmitted))
        fleet.wait_until(lambda: "updates of round" in again.output or "goes on after" in again.output)
        following = small.round(run)
        assert small.send(small.answer(following)).accepted
    assert serve.output.count("small is quarantined") == 1
    assert "small is out of quarantine" in again.output


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff" * 100, b"[" * 60_000, b"x" * 66_000],
    ids=["empty", "cut off", "binary", "nested", "large"],
)
def test_garbage_on_every_topic_stops_nobody(make_fleet: Any, embedded: str, raw: bytes) -> None:
    fleet = make_fleet(embedded)
    fleet.write({"small": ("1GiB", 100.0)})
    serve = fleet.serve(*ROUNDS)
    agent = fleet.agent("small")
    with hand_made(embedded, "stranger") as stranger:
        fleet.wait_for(lambda records: len(records) > 1)
        for topic in (
            *(
                TOPICS.presence("small"),
                TOPICS.presence("x"),
                TOPICS.up("small", "need"),
                TOPICS.upload_manifest("small", "u"),
            ),
            *(TOPICS.upload_chunk("small", "u", 0), TOPICS.upload_chunk("small", "u", "x"), TOPICS.current("other")),
            *(TOPICS.broadcast_chunk("fedms", "ab" * 32, 0), TOPICS.broadcast_chunk("fedms", "x", "y")),
            *(TOPICS.repair_chunk("fedms", "ab" * 32, 0), TOPICS.repair_chunk("fedms", "x", "y")),
            *(TOPICS.down("small", "ack"), TOPICS.down("small", "missing"), TOPICS.down("small", "dance")),
        ):
            stranger.link.publish(topic, raw)
    assert serve.wait() == 0, serve.output
    assert agent.process.poll() is None, agent.output
    assert "Traceback" not in serve.output + agent.output
