"""Each test begins with a board in a known state, whoever killed the one before."""

from __future__ import annotations

from fleetune.tools.hil.device import FILLER, SCRATCH, DeviceUnderTest
from fleetune.tools.places import AGENT


def test_what_a_killed_test_leaves_is_taken_away(fleet_device: DeviceUnderTest) -> None:
    link, agent = fleet_device.link, fleet_device.unit(AGENT, "MainPID")
    fleet_device.start("left", "sleep 3600")
    fleet_device.put(f"{SCRATCH}/left", b"left")
    fleet_device.run(f"echo left >{FILLER}; tc qdisc replace dev {link} root tbf rate 1mbit burst 2kb latency 1s")
    fleet_device.run("systemctl stop systemd-timesyncd; date --set='+2 hours'")
    fleet_device.restore()
    units = fleet_device.run("systemctl list-units --all --plain --no-legend 'fleetune-hil*'")
    assert units == ""
    assert fleet_device.run(f"ls -d {SCRATCH} {FILLER} 2>/dev/null || true") == ""
    assert "tbf" not in fleet_device.run(f"tc qdisc show dev {link}")
    assert fleet_device.unit(AGENT, "MainPID") != agent
