"""What the emulated board is told, and tells: programs and files, through the agent that QEMU has in it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import RunFailedError
from fleetune.tools.emulator.channel import Channel

_PIECE = 1 << 20
"""Bytes of a file that are sent at once."""


@dataclass(frozen=True)
class Answer:
    """What a program on the board came to.

    Attributes:
        code: Its exit status.
        out: What it printed.
        err: What it complained about.
    """

    code: int
    out: str
    err: str


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
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            check()
            try:
                with Channel(self.socket, 5.0) as channel:
                    channel.wake()
                    return
            except OSError:  # not yet
                time.sleep(1.0)
        raise RunFailedError(f"the board did not come up in {timeout_s:.0f} s", f"see {self.log}, what it said last")

    def run(self, *command: str, timeout_s: float = 120.0) -> Answer:
        """Run a program on the board, as root, to its end.

        Raises:
            RunFailedError: There is no such program, or it does not end in time.
            OSError: The board does not answer.
        """
        with Channel(self.socket, timeout_s) as channel:
            channel.wake()
            number = channel.ask("guest-exec", path=command[0], arg=list(command[1:]), **{"capture-output": True})
            ends = time.monotonic() + timeout_s
            while time.monotonic() < ends:
                state = channel.ask("guest-exec-status", pid=number["pid"])
                if state["exited"]:
                    out, err = (
                        base64.b64decode(state.get(name, "")).decode("utf-8", "replace")
                        for name in ("out-data", "err-data")
                    )
                    return Answer(state.get("exitcode", -state.get("signal", 0)), out, err)
                time.sleep(0.2)
        raise RunFailedError(f"{command[0]} did not end in {timeout_s:.0f} s on the board", f"see {self.log}")

    def write(self, path: str, data: bytes, *, timeout_s: float = 120.0) -> None:
        """Write a file on the board, as root.

        Raises:
            RunFailedError: It cannot be written there.
            OSError: The board does not answer.
        """
        with Channel(self.socket, timeout_s) as channel:
            channel.wake()
            handle = channel.ask("guest-file-open", path=path, mode="w")
            try:
                for start in range(0, len(data), _PIECE):
                    piece = base64.b64encode(data[start : start + _PIECE]).decode("ascii")
                    channel.ask("guest-file-write", handle=handle, **{"buf-b64": piece})
            finally:
                channel.ask("guest-file-close", handle=handle)

    def read(self, path: str, *, timeout_s: float = 120.0) -> bytes:
        """Read a file of the board.

        Raises:
            RunFailedError: It cannot be read there.
            OSError: The board does not answer.
        """
        data = bytearray()
        with Channel(self.socket, timeout_s) as channel:
            channel.wake()
            handle = channel.ask("guest-file-open", path=path, mode="r")
            try:
                while True:
                    piece = channel.ask("guest-file-read", handle=handle, count=_PIECE)
                    data += base64.b64decode(piece["buf-b64"])
                    if piece["eof"]:
                        return bytes(data)
            finally:
                channel.ask("guest-file-close", handle=handle)
