"""Whether the clock can be right. Boards that lose power may lose the time, and certificates then look invalid."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import msgspec

from fleetune.edge.resources.probes.tree import Tree

AHEAD_LIMIT_S = 10 * 365.25 * 86400
"""Seconds after the newest date that we know, beyond which a clock is taken to be wrong."""

_SYNCHRONISED = "/run/systemd/timesync/synchronized"
_DATED = ("/var/lib/systemd/timesync/clock", "/usr/lib/clock-epoch")  # systemd touches them when it knows the time
_STA_UNSYNC = 0x40  # linux/timex.h
_TIME_ERROR = 5


class Clock(msgspec.Struct, frozen=True):
    """The clock, in seconds since 1970 (UTC).

    Attributes:
        now_s: What the clock says.
        newest_known_s: A date that has passed for sure: of the newest file of this kit, or of systemd's record.
        rtc: Whether there is a clock chip; without a battery of its own, as on most boards, it forgets the time too.
        synchronised: Whether the kernel or systemd knows it to be right; None where neither tells.
    """

    now_s: float
    newest_known_s: float
    rtc: bool
    synchronised: bool | None

    @property
    def behind_s(self) -> float:
        """Seconds that it is behind for sure."""
        return max(0.0, self.newest_known_s - self.now_s)

    @property
    def sane(self) -> bool:
        """Whether it can be right: not behind, and not more than :data:`AHEAD_LIMIT_S` ahead."""
        return self.newest_known_s <= self.now_s <= self.newest_known_s + AHEAD_LIMIT_S


def read_clock(tree: Tree, now_s: float | None = None) -> Clock:
    """The clock.

    Args:
        tree: Where to read.
        now_s: What the clock says; None to ask it.
    """
    return Clock(
        now_s=time.time() if now_s is None else now_s,
        newest_known_s=_newest_known_s(tree),
        rtc=bool(tree.names("/sys/class/rtc", "rtc[0-9]+")),
        synchronised=_synchronised(tree),
    )


def _newest_known_s(tree: Tree) -> float:
    dates = [file.stat().st_mtime for file in Path(__file__).parents[2].rglob("*.py")]
    return max(dates + [date for date in map(tree.modified_s, _DATED) if date is not None])


def _synchronised(tree: Tree) -> bool | None:
    if tree.has(_SYNCHRONISED):
        return True
    return _kernel_synchronised() if tree.live else None


class _Timex(ctypes.Structure):
    """``struct timex`` of the kernel; we read up to its status, and leave room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


def _kernel_synchronised() -> bool | None:
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    timex = _Timex()  # modes 0: read only
    state = adjtimex(ctypes.byref(timex))
    return None if state < 0 else state != _TIME_ERROR and not timex.status & _STA_UNSYNC
