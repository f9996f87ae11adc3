"""Thousands of devices in one process, made of nothing but their messages; and a listener that only counts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from fleetune.edge.protocol import chunks
from fleetune.edge.protocol.codec import Codec
from fleetune.edge.protocol.link import BrokerAddress, Link, Received
from fleetune.edge.protocol.messages import Announcement, Presence, UpdateManifest, encode, open_envelope, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.tools.bench.noop import BACKBONE, FLEET, JOB, NoOpSpec

TOPICS = Topics(FLEET)


def main(path: str, role: str) -> None:
    """``inject`` answers every announcement for all devices; ``replay`` sends the same to whoever counts."""
    spec = msgspec.json.decode(Path(path).read_bytes(), type=NoOpSpec)
    if role == "count":
        count(spec)
    else:
        inject(spec, alone=role == "replay")


def inject(spec: NoOpSpec, *, alone: bool) -> None:
    """Send an update of each device in every round.

    Args:
        spec: Devices, tensors and rounds.
        alone: Whether there is no aggregator: rounds follow each other as soon as all of one was sent.
    """
    link = Link(
        BrokerAddress(spec.host, spec.port),
        f"injector-{spec.devices[0]}",
        subscriptions=[TOPICS.current("+")],
        will=None,
    )
    link.connect()
    for device in spec.devices:
        here = Presence(name=device, state="idle", boot=1, kit="")
        link.publish(TOPICS.presence(device), encode(here), retain=True)
    tensors = {name: np.ones(shape, np.float32) for name, shape in spec.shapes.items()}
    data = Codec.named(spec.codec).encode(tensors)
    if alone:
        for version in range(spec.rounds):
            _send(link, _updates(spec, _announcement(version), data))
        link.close()
        return
    finished = False
    while not finished:
        for event in link.events(1.0):
            if isinstance(event, Received) and event.payload:
                announced = open_envelope(event.payload, Announcement)
                finished = announced.stage == "finished"
                link.send(_updates(spec, announced, data if announced.stage == "global" else b""))
    link.close()


def _updates(spec: NoOpSpec, announced: Announcement, data: bytes) -> Iterator[tuple[str, bytes]]:
    payload = chunks.describe(data, spec.codec) if data else None
    run, version = announced.run, announced.version
    for device in spec.devices:
        update = f"{run}-{JOB}-{version}"
        manifest = UpdateManifest(
            fleet=FLEET,
            device=device,
            update=update,
            run=run,
            job=JOB,
            version=version,
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
        expires=0.0,
    )


def _send(link: Link, messages: Iterator[tuple[str, bytes]]) -> None:
    sending = link.send(messages)
    while not sending.done:
        for _ in link.events(1.0):
            pass


def count(spec: NoOpSpec) -> None:
    """Receive what an aggregator would receive, and do nothing with it; print the seconds between first and last."""
    link = Link(
        BrokerAddress(spec.host, spec.port), "counter", subscriptions=[TOPICS.upload_chunk("+", "+", "+")], will=None
    )
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
