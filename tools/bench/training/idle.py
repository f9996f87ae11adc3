"""What an agent holds while it waits for a round, with its pack and its data open."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.edge.protocol.files import write_atomic
from fleetune.server.broker import embedded_broker, free_port
from fleetune.tools.bench.training.spec import Spec

_FLEET = """\
schema: 1
fleet: bench
devices:
  - {id: idle, profile: raspberry-pi-5, budget: {memory: 1GiB, cpu_seconds: 1000}}
"""
_WAITS = "waits for a round"
_PATIENCE_S = 1800.0
"""The first start measures what training costs."""


def idle_mib(spec: Spec, folder: Path, repeats: int) -> list[float]:
    """Resident set of an agent that waits, in MiB, one for each start.

    Args:
        spec: Names the pack and the data.
        folder: For the agent's state, fleet file and logs.
        repeats: Starts.

    Raises:
        RunFailedError: The agent ends, or does not come to wait.
    """
    write_atomic(folder / "fleet.yaml", _FLEET.encode())
    found = []
    with embedded_broker(free_port()) as broker:
        command = [sys.executable, "-m", "fleetune.tools.cli", "agent", "--fleet", str(folder / "fleet.yaml")]
        command += ["--id", "idle", "--pack", spec.pack, "--data", spec.data, "--threads", str(spec.threads)]
        command += ["--broker", f"mqtt://{broker.host}:{broker.port}", "--state", str(folder / "agent")]
        for repeat in range(repeats):
            log = folder / f"agent-{repeat}.txt"
            with log.open("wb") as file:
                agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            try:
                _await(agent, log)
                found.append(psutil.Process(agent.pid).memory_info().rss / 2**20)
            finally:
                agent.terminate()
                agent.wait()
    return found


def _await(agent: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while _WAITS not in (text := log.read_text(encoding="utf-8", errors="replace")):
        if agent.poll() is not None or time.monotonic() > deadline:
            last = text.strip().splitlines()[-1:] or [f"exit code {agent.poll()}"]
            raise RunFailedError(f"the agent does not come to wait: {last[0]}", f"see {log}")
        time.sleep(0.1)
    time.sleep(1.0)
