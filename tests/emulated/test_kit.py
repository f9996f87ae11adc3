"""The kit that is flashed, as the content tree has it: on the oldest processor each of its wheels computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emulated.device import Device
from fleetune.tools.doctor.kernels import KERNELS
from fleetune.tools.flash.content import Content, lay_out
from fleetune.tools.flash.lockfile import locked
from fleetune.tools.flash.tier import TIERS
from fleetune.tools.flash.wheelhouse import fetch_wheels
from fleetune.tools.places import KITS

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

T4 = TIERS["t4"]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return lay_out(tmp_path_factory.mktemp("content"), T4, fetch_wheels(T4, locked(T4)))


@pytest.fixture(scope="module")
def flashed(nano: Device, content: Content) -> Device:
    """The emulated board, with nothing of this machine's Fleetune: only what the kit brings."""
    site = content.root / KITS / "current" / "lib/python3.11/site-packages"
    return replace(nano, site=site, env=dict(nano.env) | {"PYTHONPATH": str(site)})


def test_its_program_starts(flashed: Device, content: Content) -> None:
    done = flashed.run(content.root / KITS / "current/bin/fleetune", "--version")
    assert done.stdout == f"fleetune {content.version}\n", done.stderr
    done = flashed.run("-c", "import fleetune.edge; print(fleetune.edge.__file__)")
    assert str(content.root) in done.stdout


@pytest.mark.parametrize("package", KERNELS)
def test_each_wheel_computes(flashed: Device, package: str) -> None:
    done = flashed.run("-m", "fleetune.tools.doctor.kernels", package)
    assert done.returncode == 0, done.stderr
