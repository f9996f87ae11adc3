"""Wheels that import and do not compute: fakes that crash as real ones do, and a real one on an old processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fleetune.tools.doctor import wheels
from fleetune.tools.doctor.kernels import _GRAPH, KERNELS
from fleetune.tools.doctor.wheels import KNOWN_GOOD, check_wheels, run_kernels
from support.lacking import lacking
from support.wheels import pins, plain_install

MODULES = {
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "msgspec": "msgspec",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "paho-mqtt": "paho",
    "pyyaml": "yaml",
}
CRASH = "import os, signal\nos.kill(os.getpid(), signal.{})\n"


def fake(folder: Path, module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package in front of the installed one, in children of this process."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))


def test_every_package_of_the_plain_install_computes_here() -> None:
    assert KERNELS.keys() == plain_install().keys()
    check = check_wheels(run_kernels())
    assert (check.verdict, check.code) == ("ok", 0)
    for package in plain_install():
        assert f"{package} {version(package)}" in check.found


@pytest.mark.parametrize("package", MODULES)
def test_a_package_that_crashes_is_named_with_the_version_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, MODULES[package], CRASH.format("SIGILL"), monkeypatch)
    check = check_wheels(run_kernels())
    assert (check.verdict, check.code) == ("failure", wheels.WHEELS)
    assert f"{package} {version(package)}: SIGILL" in check.found
    assert f"{package}=={KNOWN_GOOD[package]}" in check.fix
    assert check.found.count("SIGILL") == 1  # NumPy's fault is not that of those who import it
    assert check.fix.count("pip install") == 1


def test_what_numpys_crash_leaves_unchecked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "numpy", CRASH.format("SIGSEGV"), monkeypatch)
    check = check_wheels(run_kernels())
    assert f"numpy {version('numpy')}: ended by SIGSEGV" in check.found
    for package in ("onnxruntime", "safetensors"):
        assert f"{package} {version(package)}: not checked" in check.found


def test_a_package_that_imports_and_crashes_when_it_computes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """\
import os, signal
class SessionOptions: ...
class InferenceSession:
    def __init__(self, *_, **__): ...
    def run(self, *_):
        os.kill(os.getpid(), signal.SIGILL)
"""
    fake(tmp_path, "onnxruntime", source, monkeypatch)
    subprocess.run([sys.executable, "-c", "import onnxruntime"], check=True)
    assert "SIGILL" in check_wheels(run_kernels()).found


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("yaml", "safe_load = lambda text: {}\n", "ArithmeticError: what was parsed is wrong"),
        ("psutil", "raise ImportError('libc.so.6: version `GLIBC_2.28 not found')\n", "GLIBC_2.28"),
        ("msgspec", "json = msgpack = None\n", "AttributeError"),
    ],
)
def test_wrong_numbers_and_failed_imports_are_told_in_their_own_words(
    module: str, source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, module, source, monkeypatch)
    check = check_wheels(run_kernels())
    assert check.code == wheels.WHEELS
    assert words in check.found


def test_a_package_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "yaml", "import time\ntime.sleep(60)\n", monkeypatch)
    monkeypatch.setattr(wheels, "_TIMEOUT_S", 3.0)
    assert run_kernels()["pyyaml"] == "did not end within 3 s"


def test_the_versions_to_install_are_those_that_python_3_10_gets() -> None:
    pinned = pins(python_full_version="3.10.12", python_version="3.10", platform_machine="aarch64")
    assert {package: pinned[package] for package in plain_install()} == KNOWN_GOOD


def test_the_graph_in_the_source_is_the_one_that_its_comment_tells() -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fleetune[pack]'")
    from fleetune.tools.pack.graph import IR_VERSION, OPSET

    model = onnx.load_from_string(_GRAPH)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, *node.input, *node.output) for node in model.graph.node] == [
        ("MatMul", "a", "b", "p"),
        ("Erf", "p", "e"),
        ("Softmax", "e", "y"),
    ]
    assert (model.ir_version, model.opset_import[0].version) == (IR_VERSION, OPSET)


@pytest.mark.slow
def test_a_real_wheel_that_is_too_new_for_an_old_processor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy 2.4 and later need SSE4 (x86-64-v2); this processor has none, and the kernel kills the process."""
    if platform.machine() != "x86_64":
        pytest.skip("needs wheels for x86-64")
    emulator = shutil.which("qemu-x86_64-static")
    if emulator is None:
        lacking("needs qemu-user-static: apt-get install qemu-user-static")
    if tuple(map(int, version("numpy").split(".")[:2])) < (2, 4):
        pytest.skip("this NumPy runs on any x86-64 processor")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {emulator} -cpu core2duo -0 "{sys.executable}" {os.path.realpath(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    check = check_wheels(run_kernels())
    assert f"numpy {version('numpy')}: SIGILL" in check.found
    assert f"numpy=={KNOWN_GOOD['numpy']}" in check.fix
