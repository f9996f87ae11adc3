"""What tests of a board share."""

from __future__ import annotations

import math

import pytest

from fleetune.profiles.fleet import PROFILE_ENDING
from fleetune.profiles.measured import Measured
from fleetune.profiles.profile import read_profile
from fleetune.tools.hil.device import DeviceUnderTest
from fleetune.tools.hil.plugin import Keep
from fleetune.tools.hil.run import MEASURED
from fleetune.tools.hil.suite.jobs import Rounds
from fleetune.tools.places import STATE
from fleetune.tools.rig import SMALL, Rig

pytest_plugins = ["fleetune.tools.hil.plugin"]


@pytest.fixture
def measured(fleet_device: DeviceUnderTest, rig: Rig, keep: Keep) -> Measured:
    """What the board has measured at its first boot."""
    name = rig.fleet.device(fleet_device.name).profile.name
    file = keep(MEASURED, fleet_device.get(f"/{STATE}/board/{name}{PROFILE_ENDING}"))
    (measured,) = read_profile(str(file)).measured
    return measured


@pytest.fixture
def rounds_of(measured: Measured, rig: Rig) -> Rounds:
    """Options of a run whose rounds take so many seconds here, more or less, whatever board this is."""
    deepest = max(measured.costs.trials, key=lambda trial: (trial.depth, trial.length, trial.micro_batch))
    epoch_s = deepest.step_s / deepest.micro_batch * len(rig.samples.read_bytes().splitlines())
    return lambda seconds: (*SMALL, "--epochs", str(math.ceil(seconds / epoch_s)))
