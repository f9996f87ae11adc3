"""Programs on the emulated board, through the agent that QEMU has in it."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.emulator.channel import Channel
from fleetune.tools.waiting import wait_until


@dataclass(frozen=True)
class Guest:
    """A board that can be spoken to.

    Attributes:
        socket: Where QEMU hands on what is said to the agent in it.
        log: What the board writes to its console; for people.
    """

    socket: Path
    log: Path

    def wait_up(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until programs can be run on it.

        Args:
            timeout_s: Seconds.
            check: Called again and again; it may raise.

        Raises:
            RunFailedError: It does not come up in time.
        """

        def is_up() -> bool:
            check()
            try:
                with Channel(self.socket, 5.0) as channel:
                    channel.wake()
            except OSError:  # not yet
                return False
            return True

        late = RunFailedError(f"the board did not come up in {timeout_s:.0f} s", f"see {self.log}, what it said last")
        wait_until(is_up, timeout_s, lambda: late, every_s=1.0)

    def run(self, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a program on the board, as root, to its end, whatever it comes to.

        Raises:
            RunFailedError: There is no such program, or it does not end in time.
            OSError: The board does not answer.
        """
        with Channel(self.socket, timeout_s) as channel:
            channel.wake()
            number = channel.ask("guest-exec", path=command[0], arg=list(command[1:]), **{"capture-output": True})
            state = dict[str, Any]()

            def has_ended() -> bool:
                state.update(channel.ask("guest-exec-status", pid=number["pid"]))
                return bool(state["exited"])

            late = RunFailedError(f"{command[0]} did not end in {timeout_s:.0f} s on the board", f"see {self.log}")
            wait_until(has_ended, timeout_s, lambda: late, every_s=0.1)
        out, err = (
            base64.b64decode(state.get(name, "")).decode("utf-8", "replace") for name in ("out-data", "err-data")
        )
        return subprocess.CompletedProcess(command, state.get("exitcode", -state.get("signal", 0)), out, err)
