"""QEMU's two sockets, on each of which one JSON document is a line: its monitor (QMP), and the agent in the board."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from fleetune.edge.protocol.errors import RunFailedError

_MAX_LINE = 1 << 24
_PIECE = 1 << 16
_PAUSES_S = (0.01, 0.1, 0.4)


class Channel:
    """A connection to one of them.

    Args:
        path: The socket.
        timeout_s: Seconds that all answers together may take.

    Raises:
        OSError: Nobody is there.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._ends, self._read = time.monotonic() + timeout_s, b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)  # where somebody else speaks, QEMU lets one wait
        folder = os.open(path.parent, os.O_PATH)  # a socket's address has at most 107 bytes, and folders long names
        try:
            _connect(self._socket, f"/proc/self/fd/{folder}/{path.name}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(folder)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def greet(self) -> None:
        """Begin to speak to the monitor."""
        self._line()
        self.ask("qmp_capabilities")

    def wake(self) -> None:
        """Begin to speak to the board's agent, which may be in the midst of what it said to another."""
        number = secrets.randbits(31)
        # The byte makes it drop what it has read, and comes before its answer.
        self._send(b"\xff" + _document("guest-sync-delimited", {"id": number}))
        while True:
            line = self._line().rpartition(b"\xff")[2]
            with contextlib.suppress(ValueError):  # the rest of what was being said as the power was cut
                if json.loads(line) == {"return": number}:
                    return

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have something done, and return the answer.

        Raises:
            RunFailedError: It was refused.
            OSError: The connection ended, or there was no answer in time.
        """
        self._send(_document(what, arguments))
        while True:
            answer = json.loads(self._line())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RunFailedError(f"{what}: {answer['error'].get('desc')}", "see the board's console.log")

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(max(self._ends - time.monotonic(), 0.01))
        self._socket.sendall(data)

    def _line(self) -> bytes:
        while b"\n" not in self._read:
            self._socket.settimeout(max(self._ends - time.monotonic(), 0.01))
            piece = self._socket.recv(_PIECE)
            if not piece or len(self._read) > _MAX_LINE:
                raise ConnectionError("the emulator hung up")
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line


def _connect(to: socket.socket, address: str) -> None:
    """Connect; QEMU does not listen for a moment after somebody has left."""
    for pause in _PAUSES_S:
        with contextlib.suppress(ConnectionRefusedError):
            to.connect(address)
            return
        time.sleep(pause)
    to.connect(address)


def _document(what: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": what, "arguments": arguments}).encode() + b"\n"
