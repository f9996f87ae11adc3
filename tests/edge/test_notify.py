"""What systemd is told, on a socket such as systemd's."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.edge.agent.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and what it says where it listens."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@fleetune-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(0.2)
        yield listener, name


def heard(listener: socket.socket) -> list[str]:
    """Everything that came."""
    found = []
    while True:
        try:
            found.append(listener.recv(4096).decode())
        except TimeoutError:
            return found


def test_a_manager_hears_what_the_service_does(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.status("trains: round 3 of 9, 12 °C")
    notifier.ready()
    notifier.stopping()
    assert heard(listener) == ["STATUS=trains: round 3 of 9, 12 °C", "READY=1", "STOPPING=1"]


def test_a_status_is_one_line_so_that_none_of_it_is_taken_for_another_word(manager: tuple[socket.socket, str]) -> None:
    listener, name = manager
    Notifier({"NOTIFY_SOCKET": name}).status("failed:\nREADY=1\r\n\tx")
    assert heard(listener) == ["STATUS=failed: READY=1 x"]


def test_signs_of_life_come_three_times_in_the_managers_interval_however_often_one_is_due(
    manager: tuple[socket.socket, str],
) -> None:
    listener, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "600000", "WATCHDOG_PID": str(os.getpid())})
    end = time.monotonic() + 0.9
    while time.monotonic() < end:
        notifier.alive()
        time.sleep(0.005)
    assert 4 <= len(heard(listener)) <= 5


@pytest.mark.parametrize("environment", [
    {}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "often"},
])  # fmt: skip
def test_a_manager_that_asked_for_no_signs_of_life_of_this_process_gets_none(
    environment: dict[str, str], manager: tuple[socket.socket, str]
) -> None:
    listener, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, **environment})
    for _ in range(3):
        notifier.alive()
    assert heard(listener) == []


def test_without_a_manager_there_is_silence_and_no_error(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": str(tmp_path / "nobody")}):
        notifier = Notifier({**environment, "WATCHDOG_USEC": "1"})
        notifier.ready()
        notifier.status("trains")
        notifier.alive()
        notifier.stopping()


def test_a_manager_that_does_not_read_holds_nobody_up(manager: tuple[socket.socket, str]) -> None:
    _, name = manager
    notifier, start = Notifier({"NOTIFY_SOCKET": name}), time.monotonic()
    for _ in range(2000):
        notifier.status("x" * 1000)
    assert time.monotonic() - start < 5
