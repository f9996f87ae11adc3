"""The doctor on an emulated board, with what the plain install has there."""

from __future__ import annotations

import json

import pytest

from emulated.device import Device

pytestmark = [pytest.mark.emulated, pytest.mark.slow]


def test_every_wheel_computes_on_a_nano_and_the_doctor_says_so(nano: Device) -> None:
    done = nano.run("-m", "fleetune.tools.cli", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["wheels"]["verdict"] == "ok"
    assert f"onnxruntime {nano.pinned['onnxruntime']}" in checks["wheels"]["found"]
