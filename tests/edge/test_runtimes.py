"""The same packs train in every ONNX Runtime that a device may have: the oldest allowed, and the newest pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from support.wheels import pins, plain_install, wheels

ROOT = Path(__file__).parents[2]
TESTS = [
    *(f"tests/edge/test_{name}.py" for name in ("cache", "engine", "gate", "no_telemetry", "no_torch")),
    *(f"tests/tools/test_{name}.py" for name in ("graph", "pack")),
]

OLDEST = next(part.version for part in plain_install()["onnxruntime"].specifier if part.operator == ">=")
"""What boards with Python 3.10 have: the rebuilt Nano, JetPack 6."""

NEWEST = pins()["onnxruntime"]
INSTALLED = version("onnxruntime")
"""The rest of the suite runs in this one."""


def test_the_oldest_runtime_is_the_one_that_python_3_10_gets() -> None:
    assert pins(python_full_version="3.10.12")["onnxruntime"] == OLDEST


@pytest.mark.slow
@pytest.mark.parametrize("other", sorted({OLDEST, NEWEST} - {INSTALLED}))
def test_the_engine_passes_its_tests_in_another_runtime(other: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch: pip install 'fleetune[pack]'")
    folder = wheels(f"onnxruntime-{other}", ["onnxruntime"], "--no-deps", pinned={"onnxruntime": other})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'pytest'}", *TESTS]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"\nonnxruntime {other} from {folder}" in done.stdout
    assert " skipped" not in done.stdout
