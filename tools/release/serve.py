"""A web server for releases where there is no other: of a rehearsal, on this machine."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POLL_S = 0.05
"""How long an end may take to be noticed."""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name is Python's)
        """Say nothing: the board's own log says what it fetched."""


@contextmanager
def serve_folder(folder: Path, port: int, host: str = "127.0.0.1") -> Iterator[None]:
    """Serve a folder as long as the block lasts.

    Args:
        folder: What is served.
        port: To listen at.
        host: Address to listen at; empty for all that this machine has.

    Raises:
        OSError: Something listens there already.
    """
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer((host, port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
