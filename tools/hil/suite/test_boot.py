"""A board that was flashed has become a member of its fleet by itself."""

from __future__ import annotations

import json

from fleetune.tools.firstboot.board import JOURNAL
from fleetune.tools.firstboot.steps import STEPS
from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.plugin import Measure
from fleetune.tools.places import AGENT, SEED, STATE, UPDATE_TIMER
from fleetune.tools.rig import Rig

_MIB = 1 << 20


def test_its_first_boot_is_over(fleet_device: DeviceUnderTest) -> None:
    done = json.loads(fleet_device.run(f"cat /{STATE}/{JOURNAL}"))["done"]
    assert set(done) == set(STEPS)
    assert fleet_device.unit("fleetune-firstboot.service", "ActiveState") == {"ActiveState": "inactive"}


def test_its_agent_runs_as_a_user_of_its_own_within_its_budget(
    fleet_device: DeviceUnderTest, rig: Rig, measure: Measure
) -> None:
    unit = fleet_device.unit(AGENT, "ActiveState", "User", "MemoryMax", "MemoryCurrent")
    assert (unit["ActiveState"], unit["User"]) == ("active", "fleetune")
    assert int(unit["MemoryMax"]) == rig.fleet.device(fleet_device.name).budget.memory_mib * 1.25 * _MIB
    measure("idle memory", int(unit["MemoryCurrent"]) / _MIB, "MiB")


def test_its_keys_are_its_own_and_its_token_is_gone(fleet_device: DeviceUnderTest) -> None:
    exposed = fleet_device.run(f"find /{STATE} -perm /077 -not -type l -path '*identity*' -type f -name '*.key'")
    assert exposed == ""
    assert fleet_device.run(f"stat -c '%U %a' /{STATE}").strip() == "fleetune 700"
    assert fleet_device.run(f"find /{STATE} /{SEED} -name token 2>/dev/null || true") == ""


def test_it_looks_for_releases_by_itself(fleet_device: DeviceUnderTest) -> None:
    assert fleet_device.unit(UPDATE_TIMER, "ActiveState") == {"ActiveState": "active"}
