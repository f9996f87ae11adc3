"""The wheels of the plain install on this processor, each in a process of its own that really computes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

from fleetune.edge.resources.ending import in_words
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.kernels import KERNELS

WHEELS = 33
"""Exit code of the check."""

KNOWN_GOOD = {
    "cryptography": "50.0.2",
    "msgspec": "0.22.0",
    "numpy": "2.2.6",
    "onnxruntime": "1.23.2",
    "paho-mqtt": "2.2.0",
    "psutil": "7.2.2",
    "pynacl": "1.6.2",
    "pyyaml": "6.0.3",
    "safetensors": "0.8.0",
    "tuf": "7.0.1",
}
"""Versions for Python 3.10 and later that CI runs on an emulated Cortex-A57, the oldest processor of all tiers."""

_NUMPY = ("onnxruntime", "safetensors")
"""They import NumPy, and would be blamed for it."""

_UNCHECKED = "not checked, as it needs numpy"
_TIMEOUT_S = 120.0


def run_kernels() -> dict[str, str]:
    """Package → what is wrong with it; empty where it computes as it should."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # what takes time is their processes
        wrong = dict(zip(KERNELS, pool.map(_run, KERNELS), strict=True))
    return wrong | dict.fromkeys(_NUMPY, _UNCHECKED) if wrong["numpy"] else wrong


def _run(package: str) -> str:
    command = [sys.executable, "-m", "fleetune.tools.doctor.kernels", package]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {_TIMEOUT_S:.0f} s"
    return in_words(done)


def check_wheels(wrong: Mapping[str, str]) -> Check:
    """Whether all of them compute.

    Args:
        wrong: Package → what is wrong with it, as :func:`run_kernels` found.
    """
    failures = {package: words for package, words in wrong.items() if words}
    if not failures:
        return Check("wheels", "ok", f"they compute: {', '.join(map(_named, wrong))}")
    found = "; ".join(f"{_named(package)}: {words}" for package, words in failures.items())
    fixes = [_fix(package) for package, words in failures.items() if words != _UNCHECKED]
    return Check("wheels", "failure", found, "; ".join(fixes), WHEELS)


def _named(package: str) -> str:
    return f"{package} {_installed(package)}".rstrip()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _fix(package: str) -> str:
    if _installed(package) != KNOWN_GOOD[package]:
        return f"pip install {package}=={KNOWN_GOOD[package]}"
    if package == "numpy" and platform.machine() == "aarch64":
        return "export OPENBLAS_CORETYPE=ARMV8, as NumPy may take the processor for another one"
    again = f"pip install --force-reinstall --no-cache-dir {package}=={KNOWN_GOOD[package]}"
    return f"{again}; if it stays so, this processor cannot run it"
