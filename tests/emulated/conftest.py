"""The devices that are emulated."""

from __future__ import annotations

import pytest

from emulated.board import NANO, PI_5
from emulated.device import Device, make_device

DEVICES = {
    "nano": (NANO, "3.10.12"),  # tier T1, with what it pins: onnxruntime 1.23.2
    "nano-newest": (NANO, "3.11.2"),
    "pi-5-newest": (PI_5, "3.11.2"),
}
"""Name → board, and the version of Python whose constraints hold."""


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Each of them in turn."""
    return make_device(tmp_path_factory.mktemp(request.param), *DEVICES[request.param])


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A Jetson Nano as tier T1 has it."""
    return make_device(tmp_path_factory.mktemp("nano"), *DEVICES["nano"])
