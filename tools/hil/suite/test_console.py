"""A serial console is spoken to in whatever state somebody left it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fleetune.tools.hil.device import SCRATCH, DeviceUnderTest
from fleetune.tools.hil.protection import ConsoleWakes


@pytest.mark.needs("console")
@pytest.mark.protected_by(ConsoleWakes())
def test_a_pager_that_somebody_left_open_is_closed(fleet_device: DeviceUnderTest, shell: Any) -> None:
    strategy = fleet_device.strategy
    strategy.console.sendline("more /etc/services")
    time.sleep(3.0)
    strategy.target.deactivate(shell)
    strategy.open_shell(shell)
    assert shell.run_check("echo $((6 * 7))") == ["42"]


@pytest.mark.needs("console")
def test_commands_go_over_a_console_as_over_any_other_way(fleet_device: DeviceUnderTest, shell: Any) -> None:
    device = DeviceUnderTest(fleet_device.name, _On(shell), frozenset())
    assert len(device.run("systemctl show").splitlines()) > 100  # no pager
    assert device.run("first=1\nsecond=2\necho $((first + second))") == "3"
    assert device.ask("cat; exit 5").returncode == 5
    data = bytes(range(256)) * 20
    device.put(f"{SCRATCH}/file", data)
    assert device.get(f"{SCRATCH}/file") == data


class _On:
    """A strategy whose commands go to a shell of its own."""

    power = console = None

    def __init__(self, shell: Any) -> None:
        self.command = shell
