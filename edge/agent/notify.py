"""What systemd is told: that the service is up, what it does, and that it still does something."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Speaks systemd's notification protocol (sd_notify(3)); silent where no service manager listens.

    Args:
        environment: Where the service manager says where it listens, and how often it wants a sign of life.
    """

    def __init__(self, environment: os._Environ[str] | dict[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = environment.get("WATCHDOG_USEC", "") if mine else ""
        self._every = int(limit) / 3e6 if limit.isdigit() and int(limit) else None  # a third: one may be lost
        self._last = 0.0

    def ready(self) -> None:
        """The service is up."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """What it does, for people."""
        self._send(f"STATUS={' '.join(text.split())}")

    def alive(self) -> None:
        """A sign of life, if one is due; call it often."""
        now = time.monotonic()
        if self._every is not None and now - self._last > self._every:
            self._last = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service ends."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.setblocking(False)
            try:
                manager.sendto(message.encode(), self._address)
            except OSError:
                return  # sd_notify is advice: a manager that does not take it is no reason to stop training
