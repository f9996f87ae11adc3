"""A serial console is spoken to in whatever state somebody left it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fleetune.tools.hil.device import FleetDevice
from fleetune.tools.hil.protection import ConsoleWakes


@pytest.mark.needs("console")
@pytest.mark.protected_by(ConsoleWakes())
def test_a_pager_that_somebody_left_open_is_closed(fleet_device: FleetDevice, shell: Any) -> None:
    strategy = fleet_device.strategy
    strategy.console.sendline("more /etc/services")
    time.sleep(3.0)
    strategy.target.deactivate(shell)
    strategy.open_shell(shell)
    assert shell.run_check("echo $((6 * 7))") == ["42"]


@pytest.mark.needs("console")
def test_what_a_test_prints_opens_no_pager(fleet_device: FleetDevice, shell: Any) -> None:
    long = FleetDevice(fleet_device.name, _On(shell), frozenset()).run("systemctl show")
    assert len(long.splitlines()) > 100


class _On:
    """A strategy whose commands go to a shell of its own."""

    power = console = None

    def __init__(self, shell: Any) -> None:
        self.command = shell
