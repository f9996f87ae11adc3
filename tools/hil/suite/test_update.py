"""A board takes a release, and goes back from one that does not come up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.plugin import Measure, Serve
from fleetune.tools.hil.protection import KitLine
from fleetune.tools.hil.releases import build_like, forget_wheels
from fleetune.tools.hil.suite.jobs import DONE_WITHIN_S
from fleetune.tools.places import UPDATER
from fleetune.tools.release.publish import publish
from fleetune.tools.release.repository import Releases
from fleetune.tools.release.rollout import Rollout
from fleetune.tools.rig import SMALL, Rig

_WITHIN_S = 600.0

RETURN = KitLine("it goes back", "tools/update/update.py", 'if health != "up":', "if False:")


def _release(build: Path, device: DeviceUnderTest, rig: Rig) -> Rollout:
    """Publish a build, let the board do what its timer does every hour, and wait until that is over."""
    with Releases(rig.releases) as releases:
        rollout = publish(releases, [build], [], [device.name], 0.0)
    # Its timer may have started the updater before: that one has not seen the release.
    device.ask(f"systemctl restart {UPDATER}", timeout_s=_WITHIN_S)
    device.wait_for_agent()
    return rollout


def test_it_takes_a_release(
    fleet_device: DeviceUnderTest, rig: Rig, build: Path, aggregator: Serve, measure: Measure, tmp_path: Path
) -> None:
    newer = build_like(build, tmp_path, lambda package: (package / "tools/NEWS").write_text("none"))
    mark, before = fleet_device.mark(), fleet_device.kit
    rollout = _release(newer, fleet_device, rig)
    assert f"release {rollout.number} is good" in fleet_device.log(mark, UPDATER)
    (kit,) = rollout.kits.values()
    assert fleet_device.kit != before
    assert kit.digest.startswith(fleet_device.kit.rpartition("/")[2])
    aggregator(*SMALL).wait_for_update(DONE_WITHIN_S)


@pytest.mark.protected_by(RETURN)
def test_it_goes_back_from_a_release_that_does_not_come_up(
    fleet_device: DeviceUnderTest, rig: Rig, build: Path, aggregator: Serve, tmp_path: Path
) -> None:
    broken = build_like(build, tmp_path, forget_wheels)
    before = fleet_device.kit
    rollout = _release(broken, fleet_device, rig)
    assert fleet_device.kit == before
    state = json.loads(fleet_device.run("fleetune update --show"))
    assert rollout.number in state["bad"]
    aggregator(*SMALL).wait_for_update(DONE_WITHIN_S)
