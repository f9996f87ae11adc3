"""What a broker does beyond its limits, as docs/brokers.md says."""

from __future__ import annotations

import time
from pathlib import Path

from fleetune.edge.protocol.messages import MAX_CHUNK
from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import free_port
from support.brokers import embedded, mosquitto
from support.mqtt5 import Peer, wait_until

TOPICS = Topics("lab")
MIB = 1 << 20
LARGE = 120 * 1024
"""Bytes; close to the largest message, so that few make many MiB."""


def send(sender: Peer, topics: list[str], size: int) -> None:
    """Publish on each topic and wait for the acknowledgements."""
    before = len(sender.acks)
    for topic in topics:
        sender.send(topic, bytes(size))
    assert wait_until(lambda: len(sender.acks) == before + len(topics), timeout=30)


class TestEmbedded:
    def test_a_payload_of_64_mib_waits_for_the_slowest(self, tmp_path: Path) -> None:
        topics = [TOPICS.broadcast_chunk("job", 1, i) for i in range(64 * MIB // LARGE)]
        with embedded(tmp_path, free_port()) as broker, Peer(broker, "sender") as sender, Peer(broker, "slow") as slow:
            slow.subscribe(TOPICS.broadcast_chunk("+", "+", "+")).stall()
            send(sender, topics, LARGE)
            slow.go_on()
            assert [m.topic for m in slow.receive(len(topics), timeout=30)] == topics

    def test_its_memory_has_an_end_and_the_oldest_messages_go_first(self, tmp_path: Path) -> None:
        topics = [TOPICS.upload_chunk("cam", "u", i) for i in range(200 * MIB // LARGE)]
        with embedded(tmp_path, free_port()) as broker, Peer(broker, "sender") as sender, Peer(broker, "slow") as slow:
            before = broker.memory()
            slow.subscribe(TOPICS.upload_chunk("+", "+", "+")).stall()
            send(sender, topics, LARGE)
            assert broker.memory() - before < 210 * MIB
            slow.go_on()
            assert wait_until(lambda: slow.messages != [] and slow.messages[-1].topic == topics[-1], timeout=30)
            arrived = [m.topic for m in slow.messages]
            assert len(arrived) < len(topics)
            assert arrived[100:] == topics[-len(arrived) + 100 :]  # the first 100 were on their way already

    def test_small_topics_take_little_memory(self, tmp_path: Path) -> None:
        with embedded(tmp_path, free_port()) as broker, Peer(broker, "sender") as sender, Peer(broker, "cam") as cam:
            cam.subscribe(TOPICS.down("cam", "+"))
            send(sender, [TOPICS.down("cam", "ack")] * 100, MAX_CHUNK)
            before = broker.memory()
            send(sender, [TOPICS.down("cam", "ack")] * 500, MAX_CHUNK)
            assert broker.memory() - before < 16 * MIB


class TestMosquitto:
    def test_it_says_why_it_hangs_up_on_a_large_message(self, tmp_path: Path) -> None:
        with mosquitto(tmp_path, free_port()) as broker, Peer(broker, "sender") as sender:
            sender.send(TOPICS.down("cam", "large"), bytes(131072))
            assert sender.ended()
            assert str(sender.ends[0]) == "Packet too large"

    def test_the_newest_messages_of_a_full_queue_go_first(self, tmp_path: Path) -> None:
        topics = [TOPICS.broadcast_chunk("job", 1, i) for i in range(4200)]
        with (
            mosquitto(tmp_path, free_port()) as broker,
            Peer(broker, "sender") as sender,
            Peer(broker, "slow", holds_acks=True) as slow,
        ):
            slow.subscribe(TOPICS.broadcast_chunk("+", "+", "+"))
            send(sender, topics, 1)
            assert len(slow.receive(20 + 4096)) == 20 + 4096
            time.sleep(0.2)
            assert [m.topic for m in slow.receive(0)] == topics[: 20 + 4096]
