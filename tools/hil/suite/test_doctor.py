"""The board's own examination finds nothing wrong."""

from __future__ import annotations

import json

from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.places import STATE


def test_the_doctor_finds_nothing_wrong(fleet_device: DeviceUnderTest) -> None:
    """The one of its first boot, as the agent's user."""
    checks = json.loads(fleet_device.run(f"cat /{STATE}/board/doctor.json"))["checks"]
    assert {check["verdict"] for check in checks} <= {"ok", "note"}
    assert {"memory", "identity", "broker", "pack"} <= {check["name"] for check in checks}
