"""Who is there, as the aggregator sees it."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from fleetune.edge.protocol.address import BrokerAddress
from fleetune.edge.protocol.identity.seals import Seals
from fleetune.edge.protocol.link import Link, Received
from fleetune.edge.protocol.messages import Presence, seal
from fleetune.edge.protocol.topics import Topics
from fleetune.server.authority.authority import Authority, Site
from fleetune.server.reception import Reception
from fleetune.server.registry import Registry

DAY = 86400.0
TOPICS = Topics("lab")


@pytest.mark.parametrize(("age", "warned"), [(330, 0), (340, 1), (400, 1)])
def test_an_aggregator_whose_credential_runs_out_says_so_in_time(
    age: float, warned: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Authority.make(tmp_path / "authority", "lab", Site(("broker",)))) as authority:
        identity = authority.make_member("aggregator", tmp_path / "aggregator")
    seals = Seals(identity)
    seals.clock.set(time.time() + age * DAY)
    link = Link(BrokerAddress("broker", 8883, tls=True), "a", subscriptions=[], seals=seals)
    reception = Reception(link, TOPICS, Registry(frozenset()))
    for _ in range(3):
        reception.look_after_own()
    assert caplog.text.count("fleetune fleet rotate aggregator") == warned


def test_a_device_that_the_fleet_file_does_not_name_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    reception = Reception(
        Link(BrokerAddress("broker", 1883), "a", subscriptions=[]), TOPICS, Registry(frozenset({"nano-1"}))
    )
    for name in ("nano-1", "nano-l", "nano-l"):
        said = seal(Presence(name=name, state="online", boot=1, kit="1", detail="waits for a round"))
        reception.presence(name, Received(TOPICS.presence(name), said, retained=False))
    assert caplog.text.count("nano-l is there, and the fleet file does not name it") == 1
    assert "nano-1 is there, and" not in caplog.text
