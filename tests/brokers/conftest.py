"""The brokers that are held to the contract, each in turn."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from fleetune.edge.protocol.topics import Topics
from fleetune.server.broker import free_port
from support.brokers import BROKERS, Broker


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that runs for all tests."""
    with BROKERS[request.param](tmp_path_factory.mktemp(request.param), free_port()) as running:
        yield running


@pytest.fixture
def topics() -> Topics:
    """The topics of a fleet that no other test, and no user of a shared broker, knows."""
    return Topics(f"contract-{uuid.uuid4().hex[:12]}")
