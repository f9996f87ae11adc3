"""The clock: certificates look invalid to a device that lost the time."""

from __future__ import annotations

from datetime import datetime, timezone

from fleetune.edge.resources.probes.clock import Clock
from fleetune.tools.doctor.host import Check
from fleetune.tools.doctor.notes import Note, noted

CLOCK = 37
"""Exit code of the check."""

_SYNCHRONISE = "sudo timedatectl set-ntp true, with a time server in reach"


def check_clock(clock: Clock) -> Check:
    """Whether the clock can be right."""
    found = _date(clock.now_s)
    if not clock.sane:
        wrong = "behind" if clock.behind_s else "more than ten years after"
        return Check(
            "clock",
            "failure",
            f"{found} is {wrong} the newest date that is known here, {_date(clock.newest_known_s)}: TLS would fail, "
            "and announcements look expired",
            _SYNCHRONISE,
            CLOCK,
        )
    notes = []
    if clock.synchronised is not True:
        words = "not synchronised" if clock.synchronised is False else "nothing says whether it is synchronised"
        notes.append(Note(words, _SYNCHRONISE))
    if not clock.rtc:
        notes.append(Note("no clock chip: a power cut loses the time until the network is back"))
    elif clock.synchronised is not True:
        notes.append(Note("a clock chip without a battery, as on most boards, loses it with the power"))
    return noted("clock", f"{found} UTC", notes)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")
