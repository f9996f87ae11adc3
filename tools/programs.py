"""Other programs: found or named with what to install, run to their end, and quoted when they fail."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fleetune.edge.protocol.errors import ConfigError, RunFailedError
from fleetune.edge.resources.probes.command import find_command

_QUOTED = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def find_program(name: str, package: str) -> str:
    """The path of a program, also where only root's PATH has it.

    Args:
        name: Of the program.
        package: What to install where it is missing.

    Raises:
        ConfigError: It is not there.
    """
    program = find_command(name)
    if program is None:
        raise ConfigError(f"this needs {name}, which is not here", f"apt-get install {package}")
    return program


def run_program(
    command: Sequence[str | Path],
    remedy: str,
    *,
    fine: Collection[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        remedy: What to do when it fails.
        fine: Exit statuses that are no failure.
        env: Variables beside those of this process.
        cwd: Folder to run it in.

    Returns:
        What it printed.

    Raises:
        RunFailedError: It failed; with the end of what it said.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env=os.environ | (env or {}), cwd=cwd
    )
    if done.returncode not in fine:
        said = _COLOURS.sub("", done.stderr.strip() or done.stdout.strip())
        if len(said) > _QUOTED:  # whole lines, where there are some
            said = said[-_QUOTED:].partition("\n")[2] or said[-_QUOTED:]
        raise RunFailedError(f"{Path(command[0]).name} ended with {done.returncode}: {said}", remedy)
    return done.stdout
