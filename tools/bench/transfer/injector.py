"""Thousands of devices in one process, made of nothing but their messages; and a listener that only counts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Announcement, Presence, UpdateManifest, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.tools.bench.transfer.noop import BACKBONE, FLEET, JOB, NoOpSpec

TOPICS = Topics(FLEET)

_AT_ONCE = 1024
"""Updates on their way at once: no broker's queue is full of them, and none is lost."""

_ASK_AGAIN = 3.0
"""Seconds without an answer after which what is not acknowledged is sent again."""


def main(path: str, role: str) -> None:
    """Do what ``role`` names: one of the three functions below."""
    spec = msgspec.json.decode(Path(path).read_bytes(), type=NoOpSpec)
    {"inject": inject, "replay": replay, "count": count}[role](spec)


def inject(spec: NoOpSpec) -> None:
    """Send an update of each device in every round, and again what is not acknowledged, as devices do."""
    link = Link(
        BrokerAddress(spec.host, spec.port),
        f"injector-{spec.devices[0]}",
        subscriptions=[TOPICS.current("+"), TOPICS.down("+", "ack")],
    )
    link.connect()
    for device in spec.devices:
        here = Presence(name=device, state="idle", boot=1, kit="")
        link.publish(TOPICS.presence(device), seal(here), retain=True)
    data = _data(spec)
    announced: Announcement | None = None
    waiting, unanswered, heard = list[str](), set[str](), time.monotonic()
    while announced is None or announced.stage != "finished":
        for event in link.events(1.0):
            if not isinstance(event, Received) or not event.payload:
                continue
            heard = time.monotonic()
            levels = TOPICS.split(event.topic)
            if levels[0] == "dn":
                unanswered.discard(levels[1])
            else:
                announced = open_envelope(event.payload, Announcement)
                waiting, unanswered = list(spec.devices), set()
        if announced is None or announced.stage == "finished":
            continue
        if time.monotonic() - heard > _ASK_AGAIN:
            waiting, unanswered, heard = [*waiting, *unanswered], set(), time.monotonic()
        some, waiting = waiting[: _AT_ONCE - len(unanswered)], waiting[_AT_ONCE - len(unanswered) :]
        unanswered.update(some)
        link.send(_updates(some, spec, announced, data if announced.stage == "global" else b""))
    link.close()


def replay(spec: NoOpSpec) -> None:
    """Send the same to whoever counts: rounds follow each other as soon as all of one was sent."""
    here = BrokerAddress(spec.host, spec.port)
    link = Link(here, "replay", subscriptions=[TOPICS.aggregator_presence])
    link.connect()
    data = _data(spec)
    for version in range(spec.rounds):
        sending = link.send(_updates(spec.devices, spec, _announcement(version), data))
        while not sending.done:
            for _ in link.events(1.0):
                pass
    link.close()


def _data(spec: NoOpSpec) -> bytes:
    return Codec.named(spec.codec).encode({name: np.ones(shape, np.float32) for name, shape in spec.shapes.items()})


def _updates(
    devices: Iterable[str], spec: NoOpSpec, announced: Announcement, data: bytes
) -> Iterator[tuple[str, bytes]]:
    payload = chunks.describe(data, spec.codec) if data else None
    run, version = announced.run, announced.version
    for device in devices:
        update = f"{run}-{JOB}-{version}"
        manifest = UpdateManifest(
            fleet=FLEET,
            device=device,
            update=update,
            run=run,
            job=JOB,
            version=version,
            issued=0.0,
            backbone=BACKBONE,
            samples=1,
            metrics={},
            payload=payload,
        )
        yield TOPICS.upload_manifest(device, update), seal(manifest)
        if data:
            yield TOPICS.upload_chunk(device, update, 0), data


def _announcement(version: int) -> Announcement:
    """What an aggregator would have said."""
    return Announcement(
        fleet=FLEET,
        run="alone",
        job=JOB,
        version=version,
        method="fedms",
        stage="global",
        round=version,
        rounds=version,
        backbone=BACKBONE,
        quantisation="nf4",
        settings={},
        issued=0.0,
        expires=0.0,
    )


def count(spec: NoOpSpec) -> None:
    """Receive what an aggregator would receive, and do nothing with it; print the seconds between first and last."""
    link = Link(BrokerAddress(spec.host, spec.port), "counter", subscriptions=[TOPICS.upload_chunk("+", "+", "+")])
    link.connect()
    print("ready", flush=True)  # noqa: T201
    expected, seen, first = 2 * spec.rounds * len(spec.devices), 0, 0.0
    while seen < expected:
        for event in link.events(1.0):
            if isinstance(event, Received):
                first = first or time.monotonic()
                seen += 1
    print(time.monotonic() - first, flush=True)  # noqa: T201
    link.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
