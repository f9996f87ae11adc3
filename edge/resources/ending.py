"""Why a process ended. Nothing but the standard library: `fleetune doctor` asks before it trusts any wheel."""

from __future__ import annotations

import signal
import subprocess

_SHOWN = 200  # characters of what a process complained about


def in_words(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a process failed; empty if it did not."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"{name}: an instruction that this processor lacks" if name == "SIGILL" else f"ended by {name}"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return said[0][:_SHOWN]
